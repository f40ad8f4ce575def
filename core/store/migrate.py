"""Files of older schemas as the rows of the one after: a function a step."""

# pyarrow has no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..errors import StoreError
from ..images import picture, place
from ..types import Completion, Image, Observation
from .ids import derived_id
from .parquet import Reader, damaged
from .schema import EpisodeRow, StepRow, VerdictRow


@dataclass(frozen=True, slots=True)
class Rows:
    """What a folder of schema 3 holds."""

    episodes: list[EpisodeRow]
    steps: list[StepRow]
    verdicts: list[VerdictRow]


_OBSERVATION_2 = pa.struct(
    {"text": pa.string(), "images": pa.list_(pa.string()), "actions": pa.list_(pa.string())}
)
_COMPLETION_2 = pa.struct(
    {
        "text": pa.string(),
        "token_ids": pa.list_(pa.int32()),
        "logprobs": pa.list_(pa.float32()),
        "finish": pa.string(),
        "tokenizer": pa.string(),
        "version": pa.int32(),
    }
)
_STEP_2 = pa.struct(
    {
        "observation": _OBSERVATION_2,
        "action": pa.struct({"text": pa.string(), "completion": _COMPLETION_2}),
        "reward": pa.float64(),
    }
)
SCHEMA_2 = pa.schema(
    {
        "task": pa.struct({"id": pa.string(), "instruction": pa.string(), "max_steps": pa.int32()}),
        "seed": pa.int64(),
        "attempt": pa.int32(),
        "policy": pa.string(),
        "replayed": pa.int32(),
        "steps": pa.list_(_STEP_2),
        "final": _OBSERVATION_2,
        "stop": pa.string(),
        "success": pa.bool_(),
        "error": pa.string(),
        "verdict": pa.struct(
            {"score": pa.float64(), "feedback": pa.string(), "judge": pa.string()}
        ),
    }
)
"""One row an episode, without ids, prompts or the fields of tasks; an image is the SHA-256 of its
file."""


def from_2(reader: Reader, images: Path) -> Rows:
    """Ids are made of what the episodes are and of their places in the file; prompts are empty.

    Raises:
        StoreError: the file, or an image in the folder ``images``, is missing or damaged.
    """
    if not reader.file.schema_arrow.equals(SCHEMA_2):
        raise damaged(reader.path, "its columns are not those of schema version 2")
    album = _Album(images)
    rows = Rows([], [], [])
    try:
        for k in reader.groups:
            for row in reader.group(k).to_pylist():
                _add_2(rows, row, album)
    except StoreError:
        raise
    except (LookupError, TypeError, ValueError) as error:
        raise damaged(reader.path, error) from error
    return rows


MIGRATIONS: dict[int, Callable[[Reader, Path], Rows]] = {2: from_2}


class _Album:
    """Handles of images by their names, each file looked at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, Image] = {}

    def image(self, name: str) -> Image:
        if name not in self._known:
            path = place(self._folder, Image(name, 0, 0))
            try:
                png = path.read_bytes()
            except OSError as error:
                raise StoreError(f"cannot read the image {path}: {error.strerror}") from error
            if hashlib.sha256(png).hexdigest() != name:
                raise StoreError(f"the image {path} is damaged: its content is not what it was")
            try:
                opened = picture(png)
            except ValueError as error:
                raise StoreError(f"cannot use the image {path}: {error}") from error
            self._known[name] = Image(name, opened.width, opened.height)
        return self._known[name]

    def observation(self, row: dict[str, Any]) -> Observation:
        images = tuple(map(self.image, row["images"]))
        return Observation(row["text"], images, tuple(row["actions"]))


def _add_2(rows: Rows, row: dict[str, Any], album: _Album) -> None:
    task, steps, verdict = row["task"], row["steps"], row["verdict"]
    actions = [step["action"]["text"] for step in steps]
    id = derived_id(
        task["id"], row["seed"], row["attempt"], row["policy"], actions, len(rows.episodes)
    )
    first = len(rows.steps)
    reward = sum(step["reward"] for step in steps)
    rows.episodes.append(
        EpisodeRow(
            id=id,
            parent="",
            task_id=task["id"],
            instruction=task["instruction"],
            max_steps=task["max_steps"],
            task_data="{}",
            seed=row["seed"],
            attempt=row["attempt"],
            policy=row["policy"],
            replayed=row["replayed"],
            restored=0,
            stop=row["stop"],
            success=row["success"],
            reward=None if math.isnan(reward) else reward,
            error=row["error"],
            final=album.observation(row["final"]),
            steps=len(steps),
            first_step=first,
        )
    )
    for turn, step in enumerate(steps):
        action, stored = step["action"], step["action"]["completion"]
        completion = Completion(
            stored["text"],
            tuple(stored["token_ids"]),
            tuple(stored["logprobs"]),
            stored["finish"],
            stored["tokenizer"],
            stored["version"],
        )
        observation = album.observation(step["observation"])
        rows.steps.append(
            StepRow(
                id, turn, observation, action["text"], "", None, step["reward"], completion, None
            )
        )
    rows.verdicts.append(
        VerdictRow(id, verdict["score"], verdict["feedback"], verdict["judge"], ())
    )
