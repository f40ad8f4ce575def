"""Judged trajectories into a folder."""

import math
import shutil
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

from ..errors import DiskError, StoreError
from ..images import STORE
from ..tasks import task_data
from ..types import Image, Judged, Task, Trajectory
from .ids import derived_id
from .parquet import writing
from .prompts import shared
from .schema import EPISODE, EPISODES, STEP, STEPS, VERDICTS, EpisodeRow, StepRow
from .shapes import FAULTS
from .trajectories import TRAJECTORIES
from .verdicts import UNKNOWN, JudgeIdentity, check, save

GROUP = 1024
"""Steps in a row group, unless one episode alone has more."""


def write_trajectories(
    folder: Path,
    judged: Sequence[Judged],
    images: Path,
    judge: JudgeIdentity | None = None,
    origin: Mapping[str, str] | None = None,
) -> None:
    """Write ``judged`` to ``folder``, which is there, instead of what it held before.

    Each file appears whole, ``episodes.parquet`` last: without it there are no episodes.

    Args:
        folder: where to.
        judged: in this order. A trajectory without an id is given one, made of what it is and of
            its place here.
        images: the folder for images; what it has already is not written again.
        judge: whose verdicts these are.
        origin: where the episodes come from, in words that are read back by ``read_origin``.

    Raises:
        StoreError: A value cannot be kept as it is (NaN, a score outside [0, 1], text that is not
            Unicode, an id twice); the message names the trajectory. Or the disk is full.
        WorldError: a task has fields that cannot be kept.
    """
    named = _named(judged)
    for one in named:
        check(label(one), one.verdict, len(one.trajectory.steps))
    judge = judge or UNKNOWN
    metadata = {"images": images.name, "judge": judge.hash, "origin": dict(origin or {})}
    rows = _episode_rows([one.trajectory for one in named])
    try:
        episodes = EPISODE.table(rows)
    except FAULTS as error:
        raise _culprit(folder, named, rows) or _cannot(folder, str(error)) from error
    seen: dict[Image, Image] = {}
    with writing(folder / STEPS, STEP.schema, metadata) as file:
        for some in _groups(named):
            steps = [row for one in some for row in _step_rows(one.trajectory)]
            try:
                table = STEP.table(steps)
            except FAULTS as error:
                raise _culprit(folder, some, ()) or _cannot(folder, str(error)) from error
            file.write_table(table, row_group_size=max(1, len(steps)))
            _collect(_pictures(steps), seen)
        _collect((image for row in rows for image in row.final.images), seen)
        STORE.save(seen.values(), images)
        _clear(folder)
    save(folder, judge, ((one.trajectory.id, one.verdict) for one in named))
    with writing(folder / EPISODES, EPISODE.schema, metadata) as file:
        file.write_table(episodes, row_group_size=GROUP)


def label(judged: Judged) -> str:
    return f"task {judged.trajectory.task.id!r}, attempt {judged.trajectory.attempt}"


def _named(judged: Sequence[Judged]) -> list[Judged]:
    """All with ids, each of which is there once."""
    named: list[Judged] = []
    places: dict[str, Judged] = {}
    for place, one in enumerate(judged):
        t = one.trajectory
        if not t.id:
            actions = [step.action.text for step in t.steps]
            new_id = derived_id(t.task.id, t.seed, t.attempt, t.policy, actions, place)
            one = replace(one, trajectory=replace(t, id=new_id))
        if other := places.get(one.trajectory.id):
            raise StoreError(
                f"{label(one)} has the id {one.trajectory.id!r}, but so has {label(other)}; "
                "an id names one episode"
            )
        places[one.trajectory.id] = one
        named.append(one)
    return named


def _episode_rows(trajectories: Sequence[Trajectory]) -> list[EpisodeRow]:
    tasks: dict[int, tuple[Task, str]] = {}  # attempts share their task
    rows: list[EpisodeRow] = []
    first = 0
    for t in trajectories:
        reward = t.reward
        if id(t.task) not in tasks:
            tasks[id(t.task)] = (t.task, task_data(t.task))
        rows.append(
            EpisodeRow(
                id=t.id,
                parent=t.parent,
                task_id=t.task.id,
                instruction=t.task.instruction,
                max_steps=t.task.max_steps,
                task_data=tasks[id(t.task)][1],
                seed=t.seed,
                attempt=t.attempt,
                policy=t.policy,
                replayed=t.replayed,
                restored=t.restored,
                stop=t.stop.value,
                success=t.success,
                reward=None if math.isnan(reward) else reward,
                error=t.error,
                final=t.final,
                steps=len(t.steps),
                first_step=first,
            )
        )
        first += len(t.steps)
    return rows


def _step_rows(trajectory: Trajectory) -> list[StepRow]:
    return [
        StepRow(
            trajectory.id,
            turn,
            step.observation,
            step.action.text,
            step.action.invalid,
            step.answer,
            step.reward,
            step.action.completion,
            prompt,
            step.action.place,
            step.action.left_out,
        )
        for turn, step, prompt in zip(
            count(), trajectory.steps, shared(trajectory.steps), strict=False
        )
    ]


def _groups(judged: Sequence[Judged]) -> Generator[list[Judged]]:
    """Whole episodes, as many as go into a row group."""
    some: list[Judged] = []
    steps = 0
    for one in judged:
        more = len(one.trajectory.steps)
        if some and steps + more > GROUP:
            yield some
            some, steps = [], 0
        some.append(one)
        steps += more
    if steps:
        yield some


def _pictures(rows: Iterable[StepRow]) -> Generator[Image]:
    for row in rows:
        yield from row.observation.images
        for message in row.prompt.messages if row.prompt else ():
            for part in message.parts:
                if isinstance(part, Image):
                    yield part


def _collect(images: Iterable[Image], seen: dict[Image, Image]) -> None:
    """Each once; one that brings its bytes rather than one that does not."""
    for image in images:
        if image.png or image not in seen:
            seen[image] = image


def _clear(folder: Path) -> None:
    """Before files of other episodes take their places."""
    try:
        for name in (EPISODES, TRAJECTORIES):
            (folder / name).unlink(missing_ok=True)
        if (folder / VERDICTS).exists():
            shutil.rmtree(folder / VERDICTS)
    except OSError as error:
        raise DiskError(f"cannot write {error.filename}: {error.strerror}") from error


def _culprit(
    folder: Path, judged: Sequence[Judged], rows: Sequence[EpisodeRow]
) -> StoreError | None:
    """Which trajectory cannot be kept, and why; None if each alone can."""
    for row, one in zip(rows, judged, strict=False):
        try:
            EPISODE.table([row])
        except FAULTS as error:
            return _cannot(folder, f"{label(one)}: {error}")
    for one in judged:
        for step in _step_rows(one.trajectory):
            try:
                STEP.table([step])
            except FAULTS as error:
                return _cannot(folder, f"{label(one)}: step {step.turn}: {error}")
    return None


def _cannot(folder: Path, why: str) -> StoreError:
    return StoreError(f"cannot write {folder}: {why}")
