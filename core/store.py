"""Trajectories on parquet, one row each, their images beside them once each by content.

The columns, nested as in ``core.types``; nothing is null but an undecided score:

    task      struct<id: string, instruction: string, max_steps: int32>
    seed      int64
    attempt   int32
    policy    string          the checkpoint that acted
    replayed  int32
    steps     list<struct<
                observation: OBSERVATION,
                action: struct<text: string, completion: struct<
                    text: string, token_ids: list<int32>, logprobs: list<float>, finish: string,
                    tokenizer: string, version: int32>>,
                reward: double>>
    final     OBSERVATION
    stop      string          terminated, truncated or failed
    success   bool
    error     string
    verdict   struct<score: double, feedback: string, judge: string>

    OBSERVATION = struct<text: string, images: list<string>, actions: list<string>>

An image is the SHA-256 of its bytes in hexadecimal; the bytes are ``images/ab/abcdef....png`` in
the run's folder. Log-probabilities are 32-bit, as engines make them. The file's metadata, under
``selfwright``, is JSON: ``schema`` (the version of all this) and ``images`` (that folder's name).
"""

# pyarrow has no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import DiskError, StoreError
from .files import atomic_write, atomic_write_bytes, sync_folder
from .run import iterations
from .types import (
    Action,
    Completion,
    Judged,
    Observation,
    Step,
    Stop,
    Task,
    Trajectory,
    Verdict,
)

if TYPE_CHECKING:
    import datasets

VERSION = 2
TRAJECTORIES = "trajectories.parquet"
"""What an iteration's trajectories are called in its folder."""

_KEY = b"selfwright"
_OBSERVATION = pa.struct(
    {"text": pa.string(), "images": pa.list_(pa.string()), "actions": pa.list_(pa.string())}
)
_COMPLETION = pa.struct(
    {
        "text": pa.string(),
        "token_ids": pa.list_(pa.int32()),
        "logprobs": pa.list_(pa.float32()),
        "finish": pa.string(),
        "tokenizer": pa.string(),
        "version": pa.int32(),
    }
)
_STEP = pa.struct(
    {
        "observation": _OBSERVATION,
        "action": pa.struct({"text": pa.string(), "completion": _COMPLETION}),
        "reward": pa.float64(),
    }
)
SCHEMA = pa.schema(
    {
        "task": pa.struct({"id": pa.string(), "instruction": pa.string(), "max_steps": pa.int32()}),
        "seed": pa.int64(),
        "attempt": pa.int32(),
        "policy": pa.string(),
        "replayed": pa.int32(),
        "steps": pa.list_(_STEP),
        "final": _OBSERVATION,
        "stop": pa.string(),
        "success": pa.bool_(),
        "error": pa.string(),
        "verdict": pa.struct(
            {"score": pa.float64(), "feedback": pa.string(), "judge": pa.string()}
        ),
    }
)


def write_trajectories(path: Path, judged: Sequence[Judged], images: Path) -> None:
    """Write ``judged`` to ``path`` in one step, and the images that ``images`` does not hold yet.

    Raises:
        StoreError: A value cannot be kept as it is (NaN, a score outside [0, 1], text that is not
            Unicode); the message names the trajectory. Or the disk is full.
    """
    album = _Album(images)
    rows = [_row(item, album.put) for item in judged]
    metadata = json.dumps({"schema": VERSION, "images": images.name}).encode()
    schema = SCHEMA.with_metadata({_KEY: metadata})
    try:
        table = pa.Table.from_pylist(rows, schema=schema)
    except (pa.ArrowException, UnicodeError, OverflowError, TypeError) as error:
        raise StoreError(f"cannot write {path}: {_culprit(judged, rows) or error}") from error
    with atomic_write(path) as file:
        # By its name: Arrow's threads, given a file of Python's, may outlive the interpreter.
        pq.write_table(table, str(file.name), compression="zstd", write_page_checksum=True)


def read_trajectories(path: Path, images: Path | None = None) -> list[Judged]:
    """What ``write_trajectories`` wrote, in order; any task comes back as a plain ``Task``.

    Args:
        path: The parquet file.
        images: Where the images are; None looks in the folders above ``path``.

    Raises:
        StoreError: The file or an image is missing or damaged, or of another version.
    """
    table, name = _table(path)
    album = _Album(images or _find(path, name))
    try:
        return [_judged(row, album.get) for row in table.to_pylist()]
    except StoreError:
        raise
    except (TypeError, KeyError, ValueError) as error:
        raise StoreError(f"{path} is damaged: {error}") from error


def dataset(run_folder: Path, split: str | None = None) -> "datasets.Dataset":
    """All trajectories of a run's iterations, with a column ``iteration``, held in memory.

    Args:
        run_folder: A run's folder; it may be in use.
        split: What to call the result, as in ``datasets.Dataset.split``.

    Raises:
        StoreError: A file is missing or damaged, or no iteration is committed.
    """
    import datasets

    folders = iterations(run_folder)
    if not folders:
        raise StoreError(f"{run_folder} holds no committed iteration")
    tables: list[Any] = []
    for index, folder in enumerate(folders):
        table, _ = _table(folder / TRAJECTORIES)
        column = pa.array([index] * table.num_rows, pa.int32())
        tables.append(table.add_column(0, "iteration", column))
    whole = pa.concat_tables(tables).replace_schema_metadata(None)
    return datasets.Dataset(whole, split=datasets.NamedSplit(split) if split else None)


class _Album:
    """A folder of images by content, each hashed, written and read once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: dict[bytes, str] = {}
        self._images: dict[str, bytes] = {}

    def put(self, image: bytes) -> str:
        if image not in self._names:
            name = hashlib.sha256(image).hexdigest()
            path = self._path(name)
            if not path.exists():
                self._make(path.parent)
                atomic_write_bytes(path, image)
            self._names[image] = name
        return self._names[image]

    def _make(self, folder: Path) -> None:
        if not folder.exists():
            try:
                folder.mkdir(parents=True)
                sync_folder(self._folder)
                sync_folder(self._folder.parent)
            except OSError as error:
                raise DiskError(f"cannot write {folder}: {error.strerror}") from error

    def get(self, name: str) -> bytes:
        if name not in self._images:
            path = self._path(name)
            try:
                image = path.read_bytes()
            except OSError as error:
                raise StoreError(f"cannot read the image {path}: {error.strerror}") from error
            if hashlib.sha256(image).hexdigest() != name:
                raise StoreError(f"the image {path} is damaged: its content is not what it was")
            self._images[name] = image
        return self._images[name]

    def _path(self, name: str) -> Path:
        return self._folder / name[:2] / f"{name}.png"


def _table(path: Path) -> tuple[Any, str]:
    """The checked table, and the name of its images' folder."""
    try:
        # No file of Python's: Arrow's threads may outlive the interpreter, and then abort it.
        with pa.OSFile(str(path), "rb") as file:
            table = pq.ParquetFile(file, page_checksum_verification=True).read()
        metadata = json.loads((table.schema.metadata or {}).get(_KEY, b"{}"))
    except FileNotFoundError:
        raise StoreError(f"{path} is missing") from None
    except (OSError, ValueError, pa.ArrowException) as error:
        raise StoreError(f"{path} is damaged or is no parquet file: {error}") from error
    if metadata.get("schema") != VERSION:
        raise StoreError(
            f"{path} has schema version {metadata.get('schema')}, "
            f"but this version of selfwright reads {VERSION}"
        )
    if not table.schema.equals(SCHEMA):
        raise StoreError(f"{path} is damaged: its columns are not those of version {VERSION}")
    return table, metadata.get("images", "images")


def _find(path: Path, name: str) -> Path:
    """The nearest folder ``name`` above ``path``; where it would be if there is none."""
    parents = path.absolute().parents
    return next((found for up in parents if (found := up / name).is_dir()), parents[0] / name)


def _culprit(judged: Sequence[Judged], rows: list[dict[str, Any]]) -> str:
    """Which trajectory Arrow will not take, and why; empty if each alone is fine."""
    for item, row in zip(judged, rows, strict=True):
        try:
            pa.Table.from_pylist([row], schema=SCHEMA)
        except (pa.ArrowException, UnicodeError, OverflowError, TypeError) as error:
            return f"{_label(item)}: {error}"
    return ""


def _label(judged: Judged) -> str:
    return f"task {judged.trajectory.task.id!r}, attempt {judged.trajectory.attempt}"


def _row(judged: Judged, put: Callable[[bytes], str]) -> dict[str, Any]:
    trajectory, verdict = judged.trajectory, judged.verdict
    if verdict.score is not None and not 0 <= verdict.score <= 1:
        raise StoreError(
            f"{_label(judged)}: judge {verdict.judge!r} gave the score {verdict.score}; "
            "a score lies in [0, 1], and is None if undecided"
        )
    for index, step in enumerate(trajectory.steps):
        numbers = (step.reward, *step.action.completion.logprobs)
        if any(map(math.isnan, numbers)):
            raise StoreError(f"{_label(judged)}: step {index} has a reward or logprob that is NaN")
    task = trajectory.task
    return {
        "task": {"id": task.id, "instruction": task.instruction, "max_steps": task.max_steps},
        "seed": trajectory.seed,
        "attempt": trajectory.attempt,
        "policy": trajectory.policy,
        "replayed": trajectory.replayed,
        "steps": [_step_row(step, put) for step in trajectory.steps],
        "final": _observation_row(trajectory.final, put),
        "stop": trajectory.stop.value,
        "success": trajectory.success,
        "error": trajectory.error,
        "verdict": {
            "score": verdict.score,
            "feedback": verdict.feedback,
            "judge": verdict.judge,
        },
    }


def _step_row(step: Step, put: Callable[[bytes], str]) -> dict[str, Any]:
    said = step.action.completion
    completion = {
        "text": said.text,
        "token_ids": said.token_ids,
        "logprobs": said.logprobs,
        "finish": said.finish,
        "tokenizer": said.tokenizer,
        "version": said.version,
    }
    return {
        "observation": _observation_row(step.observation, put),
        "action": {"text": step.action.text, "completion": completion},
        "reward": step.reward,
    }


def _observation_row(observation: Observation, put: Callable[[bytes], str]) -> dict[str, Any]:
    return {
        "text": observation.text,
        "images": [put(image) for image in observation.images],
        "actions": observation.actions,
    }


def _judged(row: dict[str, Any], get: Callable[[str], bytes]) -> Judged:
    trajectory = Trajectory(
        task=Task(**row["task"]),
        steps=tuple(_step(step, get) for step in row["steps"]),
        final=_observation(row["final"], get),
        stop=Stop(row["stop"]),
        policy=row["policy"],
        seed=row["seed"],
        attempt=row["attempt"],
        replayed=row["replayed"],
        success=row["success"],
        error=row["error"],
    )
    return Judged(trajectory, Verdict(**row["verdict"]))


def _step(row: dict[str, Any], get: Callable[[str], bytes]) -> Step:
    action, said = row["action"], row["action"]["completion"]
    completion = Completion(
        said["text"],
        tuple(said["token_ids"]),
        tuple(said["logprobs"]),
        said["finish"],
        said["tokenizer"],
        said["version"],
    )
    return Step(
        _observation(row["observation"], get), Action(action["text"], completion), row["reward"]
    )


def _observation(row: dict[str, Any], get: Callable[[str], bytes]) -> Observation:
    images = tuple(get(name) for name in row["images"])
    return Observation(row["text"], images, tuple(row["actions"]))
