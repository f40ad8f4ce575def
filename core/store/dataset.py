"""A whole run as a ``datasets.Dataset``."""

# pyarrow and datasets have no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import StoreError
from ..types import Completion, Observation, Prompt
from .folder import iterations
from .schema import BOOL, COMPLETION, DOUBLE, INT32, INT64, MESSAGE, OBSERVATION, TEXT, TOOL
from .shapes import Many, Maybe, Record
from .trajectories import read_trajectories

if TYPE_CHECKING:
    import datasets


class _Row(NamedTuple):
    iteration: int
    episode: str
    turn: int
    place: int
    task_id: str
    instruction: str
    seed: int
    attempt: int
    policy: str
    replayed: bool
    observation: Observation
    prompt: Prompt
    completion: Completion
    action: str
    invalid: str
    answer: str | None
    reward: float
    success: bool
    stop: str
    score: float | None
    feedback: str


_SHAPE = Record(
    _Row,
    iteration=INT32,
    episode=TEXT,
    turn=INT32,
    place=INT32,
    task_id=TEXT,
    instruction=TEXT,
    seed=INT64,
    attempt=INT32,
    policy=TEXT,
    replayed=BOOL,
    observation=OBSERVATION,
    prompt=Record(Prompt, messages=Many(MESSAGE), tools=Many(TOOL), template=TEXT),
    completion=COMPLETION,
    action=TEXT,
    invalid=TEXT,
    answer=Maybe(TEXT),
    reward=DOUBLE,
    success=BOOL,
    stop=TEXT,
    score=Maybe(DOUBLE),
    feedback=TEXT,
)


def dataset(run_folder: Path, split: str | None = None) -> "datasets.Dataset":
    """A row a step of a run's iterations, with whole prompts and what is known of its episode.

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
    rows = [row for k, folder in enumerate(folders) for row in _rows(k, folder)]
    name = datasets.NamedSplit(split) if split else None
    return datasets.Dataset(_SHAPE.table(rows), split=name)


def _rows(iteration: int, folder: Path) -> list[_Row]:
    return [
        _Row(
            iteration,
            t.id,
            turn,
            step.action.place,
            t.task.id,
            t.task.instruction,
            t.seed,
            t.attempt,
            t.policy,
            turn < t.replayed,
            step.observation,
            step.action.prompt,
            step.action.completion,
            step.action.text,
            step.action.invalid,
            step.answer,
            step.reward,
            t.success,
            t.stop.value,
            one.verdict.score,
            one.verdict.feedback,
        )
        for one in read_trajectories(folder)
        for t in (one.trajectory,)
        for turn, step in enumerate(t.steps)
    ]
