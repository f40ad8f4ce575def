"""What one evaluation of one checkpoint found, and its file: ``evaluation.json``."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, TypedDict

from pydantic import ConfigDict, TypeAdapter, ValidationError

from .errors import StoreError
from .files import atomic_write_bytes
from .statistics import Agreement, Interval, Introspection, wilson

FILE = "evaluation.json"


@dataclass(frozen=True)
class TaskResult:
    """One episode: one task, played once."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False
    )

    task: str
    success: bool
    failed: bool
    """The world or the policy broke; such an episode is never a success."""
    reward: float
    steps: int
    error: str = ""
    """The error's name, then what it said; empty unless ``failed``."""
    score: float | None = None
    """The judge's, in [0, 1]; None if it was not decided."""
    invalid: int = 0
    """Steps in which nothing that was said could be read as an action."""


class Summary(TypedDict):
    """The numbers that follow from the results alone."""

    tasks: int
    successes: int
    success_rate: float
    interval: Interval
    failed: int
    failures: dict[str, int]
    mean_reward: float
    mean_steps: float
    invalid_share: float
    success_by_turn: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """One checkpoint on the tasks of one split. Failed episodes count as not solved."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False
    )

    schema: Literal[1] = 1
    checkpoint: str
    environment: dict[str, Any]
    """The world's ``use`` and options."""
    agent: dict[str, Any]
    split: str
    seed: int
    temperature: float
    tasks: int
    successes: int
    success_rate: float
    interval: Interval
    """Wilson, 95%."""
    failed: int
    """Episodes that broke, counted within ``tasks``."""
    undecided: int
    """Episodes that did not break, but that the judge could not decide."""
    failures: dict[str, int]
    """Broken episodes by the error's name."""
    environment_steps: int
    """Those of the introspection table too, as in all costs here."""
    tokens_sampled: int
    wall_s: float
    mean_reward: float
    mean_steps: float
    invalid_share: float = 0.0
    """Of all steps, those in which nothing that was said could be read as an action."""
    success_by_turn: tuple[float, ...]
    """Share of tasks solved within 1, 2, ... actions."""
    introspection: Introspection | None = None
    """For worlds of attempts only."""
    judge: str = "reward"
    """Whose scores these are."""
    agreement: Agreement | None = None
    """Of a judge other than the world's reward with the world, on what it decided; a score of at
    least 1/2 counts as "solved"."""
    results: tuple[TaskResult, ...]
    """One per task, in the order of the split."""

    @property
    def outcomes(self) -> dict[str, bool]:
        """Whether each task was solved, by id."""
        return {result.task: result.success for result in self.results}


def summarise(results: Sequence[TaskResult]) -> Summary:
    """Counts, rates and means over all episodes, broken ones included.

    ``EvaluationResult(checkpoint=..., **summarise(results), results=tuple(results))``
    """
    tasks, successes = len(results), sum(result.success for result in results)
    turns = max((result.steps for result in results), default=0)
    solved_at = Counter(result.steps for result in results if result.success)
    within, so_far = list[float](), solved_at[0]
    for turn in range(1, turns + 1):
        so_far += solved_at[turn]
        within.append(so_far / tasks)
    return Summary(
        tasks=tasks,
        successes=successes,
        success_rate=successes / max(1, tasks),
        interval=wilson(successes, tasks),
        failed=sum(result.failed for result in results),
        failures=dict(Counter(_name(r.error) for r in results if r.failed).most_common()),
        mean_reward=sum(result.reward for result in results) / max(1, tasks),
        mean_steps=sum(result.steps for result in results) / max(1, tasks),
        invalid_share=sum(r.invalid for r in results) / max(1, sum(r.steps for r in results)),
        success_by_turn=tuple(within),
    )


def write(folder: Path, evaluation: EvaluationResult) -> Path:
    """Write ``folder/evaluation.json``, whole or not at all; returns its path.

    Raises:
        StoreError: if its numbers contradict its results, or the disk is full.
    """
    path = folder / FILE
    _check(evaluation, path)
    try:
        data = _adapter().dump_json(evaluation, indent=1)
    except ValueError as error:
        raise StoreError(f"cannot write {path}: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, data + b"\n")
    return path


def read(path: Path) -> EvaluationResult:
    """An evaluation from its folder or its file.

    Raises:
        StoreError: if there is none, or it is damaged; lists what is wrong.
    """
    path = path / FILE if path.is_dir() else path
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(
            f"no evaluation at {path}: {error.strerror}; give an evaluation folder or its {FILE}"
        ) from None
    try:
        evaluation = _adapter().validate_json(data)
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc'])) or 'file'}: {fault['msg']}"
            for fault in error.errors(include_url=False, include_input=False)
        ]
        more = [f"and {len(faults) - 5} more"] if len(faults) > 5 else []
        raise StoreError(f"{path} is not an evaluation: {'; '.join(faults[:5] + more)}") from None
    _check(evaluation, path)
    return evaluation


@cache
def _adapter() -> TypeAdapter[EvaluationResult]:
    return TypeAdapter(EvaluationResult)


def _name(error: str) -> str:
    return error.split(":", 1)[0].strip() or "unknown"


def _check(evaluation: EvaluationResult, path: Path) -> None:
    results = evaluation.results
    doubled = [task for task, count in Counter(r.task for r in results).items() if count > 1]
    faults = [f"{len(doubled)} tasks occur twice, as {doubled[0]!r}"] if doubled else []
    both = [result.task for result in results if result.success and result.failed]
    faults += [f"{len(both)} tasks both succeeded and failed, as {both[0]!r}"] if both else []
    odd = [result.task for result in results if not math.isfinite(result.reward)]
    faults += [f"{len(odd)} rewards are not finite numbers, as that of {odd[0]!r}"] if odd else []
    for key, stated, found in (
        ("tasks", evaluation.tasks, len(results)),
        ("successes", evaluation.successes, sum(result.success for result in results)),
        ("failed", evaluation.failed, sum(result.failed for result in results)),
    ):
        if stated != found:
            faults.append(f"{key} is {stated}, but its results say {found}")
    if faults:
        raise StoreError(f"{path} contradicts itself: {'; '.join(faults)}")
