"""Judged trajectories from a folder, or from a file of an older schema."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

from ..errors import StoreError, WorldError
from ..images import STORE
from ..tasks import stored_task
from ..types import Action, Judged, Step, Stop, Trajectory, Verdict
from .migrate import MIGRATIONS, Rows
from .parquet import VERSION, damaged, decoded, other_version, read_rows, reading
from .prompts import Unfolder
from .schema import EPISODE, EPISODES, STEP, STEPS, EpisodeRow, StepRow
from .verdicts import read_verdicts

TRAJECTORIES = "trajectories.parquet"
"""What schema 2 called its only file. Given such a path, episodes of this schema beside it are
found, too."""


def read_trajectories(path: Path, judge: str | None = None) -> list[Judged]:
    """What ``write_trajectories`` wrote, in order; tasks with fields come back as ``StoredTask``.

    Args:
        path: a folder, its ``episodes.parquet``, or what was ``trajectories.parquet`` there.
        judge: whose verdicts, by hash; None: those that were stored with the episodes.

    Raises:
        StoreError: A file is missing, damaged or of another version, or that judge has not judged
            all of them.
    """
    folder, old = _located(path)
    if old:
        return _migrated(old, judge)
    episodes, metadata = read_rows(folder / EPISODES, EPISODE)
    _register_images(folder, metadata)
    verdicts = _verdicts(folder, metadata, judge)
    with reading(folder / STEPS, STEP) as reader:
        groups = (decoded(reader, STEP, reader.group(k)) for k in reader.groups)
        rows = (row for group in groups for row in group)
        return _assembled(folder, episodes, rows, verdicts)


def read_episode(path: Path, id: str, judge: str | None = None) -> Judged:
    """The episode ``id``, without reading the others' steps.

    Raises:
        StoreError: as ``read_trajectories``, or it is not there.
    """
    folder, old = _located(path)
    if old:
        found = (one for one in _migrated(old, judge) if one.trajectory.id == id)
        if one := next(found, None):
            return one
        raise StoreError(f"{old} holds no episode {id!r}")
    row, metadata = _episode_row(folder, id)
    _register_images(folder, metadata)
    verdicts = _verdicts(folder, metadata, judge)
    return _assembled(folder, [row], _steps_of(folder, row), verdicts, row.first_step)[0]


def read_origin(path: Path) -> Mapping[str, str]:
    """What ``write_trajectories`` was told of where the episodes come from.

    Raises:
        StoreError: The file is missing, damaged or of another version.
    """
    folder, old = _located(path)
    if old:
        return {}
    with reading(folder / EPISODES, EPISODE) as reader:
        return dict(reader.metadata.get("origin", {}))


def holds_episodes(path: Path) -> bool:
    """Whether ``read_trajectories`` would find some there."""
    folder = path if path.is_dir() else path.parent
    named = path.is_dir() or path.name in (EPISODES, STEPS, TRAJECTORIES)
    there = any((folder / name).is_file() for name in (EPISODES, TRAJECTORIES))
    return (named and there) or (path.is_file() and path.suffix == ".parquet")


def _located(path: Path) -> tuple[Path, Path | None]:
    """The folder, and the file there if that is all of an older schema.

    Raises:
        StoreError: there is none, or it is of a version that nobody reads.
    """
    if path.is_dir():
        old = path / TRAJECTORIES
        return path, old if old.exists() and not (path / EPISODES).exists() else None
    if path.exists():
        with reading(path) as reader:
            if reader.version in MIGRATIONS:
                return path.parent, path
            if reader.version not in (VERSION, *EPISODE.older):
                raise other_version(reader)
    elif path.name not in (EPISODES, STEPS, TRAJECTORIES) or not (path.parent / EPISODES).exists():
        raise StoreError(f"{path} is missing")
    return path.parent, None


def _migrated(path: Path, judge: str | None) -> list[Judged]:
    if judge is not None:
        raise StoreError(f"{path} does not say who judged; it has no verdicts of {judge} by name")
    with reading(path) as reader:
        version = reader.version
        if version not in MIGRATIONS:
            raise other_version(reader)
        rows: Rows = MIGRATIONS[version](reader, _register_images(path.parent, reader.metadata))
    verdicts = {
        row.episode: Verdict(row.score, row.feedback, row.judge, row.steps) for row in rows.verdicts
    }
    return _assembled(path, rows.episodes, rows.steps, verdicts)


def _register_images(folder: Path, metadata: Mapping[str, Any]) -> Path:
    """Let the nearest folder of images be looked in; where it would be if there is none."""
    up = (folder.absolute(), *folder.absolute().parents)
    places = [one / str(metadata.get("images", "images")) for one in up]
    found = next((place for place in places if place.is_dir()), places[0])
    STORE.look_in(found)
    return found


def _verdicts(folder: Path, metadata: Mapping[str, Any], judge: str | None) -> dict[str, Verdict]:
    return read_verdicts(folder, str(metadata.get("judge")) if judge is None else judge)


def _episode_row(folder: Path, id: str) -> tuple[EpisodeRow, Mapping[str, Any]]:
    with reading(folder / EPISODES, EPISODE) as reader:
        for k in reader.groups:
            ids: list[str] = reader.group(k, ["id"]).column("id").to_pylist()
            if id in ids:
                table = reader.group(k).slice(ids.index(id), 1)
                return decoded(reader, EPISODE, table)[0], reader.metadata
    raise StoreError(f"{folder} holds no episode {id!r}")


def _steps_of(folder: Path, row: EpisodeRow) -> list[StepRow]:
    """Its rows, of the row groups that hold them."""
    rows: list[StepRow] = []
    start = 0
    with reading(folder / STEPS, STEP) as reader:
        for k, size in enumerate(reader.sizes):
            first, last = max(0, row.first_step - start), row.first_step + row.steps - start
            if first < min(size, last):
                some = reader.group(k).slice(first, min(size, last) - first)
                rows += cast("list[StepRow]", decoded(reader, STEP, some))
            start += size
    return rows


def _assembled(
    path: Path,
    episodes: Sequence[EpisodeRow],
    rows: Iterable[StepRow],
    verdicts: Mapping[str, Verdict],
    first: int = 0,
) -> list[Judged]:
    """``rows`` are the steps of all ``episodes``, from number ``first`` on."""
    if missing := [row.id for row in episodes if row.id not in verdicts]:
        raise StoreError(
            f"{path}: that judge has judged all but {len(missing)} of these {len(episodes)} "
            f"episodes; the first that it has not is {missing[0]!r}"
        )
    left = iter(rows)
    judged: list[Judged] = []
    try:
        for row in episodes:
            if row.first_step != first:
                raise ValueError(f"episode {row.id!r} begins at {row.first_step}, not {first}")
            judged.append(Judged(_trajectory(row, left), verdicts[row.id]))
            first += row.steps
        if next(left, None):
            raise ValueError("there are steps of no episode")
    except StoreError:
        raise
    except (TypeError, ValueError, WorldError) as error:
        raise damaged(path, error) from error
    return judged


def _trajectory(row: EpisodeRow, left: Iterator[StepRow]) -> Trajectory:
    unfold = Unfolder()
    steps: list[Step] = []
    for turn, one in enumerate(islice(left, row.steps)):
        if (one.episode, one.turn) != (row.id, turn):
            raise ValueError(
                f"there is step {one.turn} of {one.episode!r}, not {turn} of {row.id!r}"
            )
        prompt = unfold.whole(one.observation.actor, one.prompt)
        action = Action(one.action, one.completion, prompt, one.invalid, one.place, one.left_out)
        steps.append(Step(one.observation, action, one.reward, one.answer))
    if len(steps) < row.steps:
        raise ValueError(f"episode {row.id!r} has {len(steps)} steps, not {row.steps}")
    return Trajectory(
        task=stored_task(row.task_id, row.instruction, row.max_steps, row.task_data),
        steps=tuple(steps),
        final=row.final,
        stop=Stop(row.stop),
        policy=row.policy,
        seed=row.seed,
        attempt=row.attempt,
        replayed=row.replayed,
        restored=row.restored,
        success=row.success,
        error=row.error,
        id=row.id,
        parent=row.parent,
    )
