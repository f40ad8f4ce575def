"""What happens in a run, told as it happens: the console, trackers and others listen."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ..core.evaluation import EvaluationResult
from ..core.types import Metrics


@dataclass(frozen=True)
class RunBegan:
    """Begun, or gone on with. Nothing was played yet."""

    name: str
    folder: Path
    recipe: Mapping[str, Any]
    """Every key of it, as ``Recipe.dump`` has them."""
    report_to: tuple[str, ...]
    """The trackers that it names."""
    iterations: int
    finished: int
    """How many of them were committed before."""


@dataclass(frozen=True)
class StageBegan:
    """Something that takes its time."""

    name: str
    total: int
    """How many episodes, or other units, it has; 0: nobody counts."""
    unit: str = "episodes"


@dataclass(frozen=True)
class StageAdvanced:
    name: str
    done: int
    """Of its episodes, or other units, so far."""


@dataclass(frozen=True)
class Stepped:
    """A step was played in a stage. Replayed ones are not told of."""

    name: str
    """The stage's."""
    steps: int
    """All that were played in it so far."""
    tokens: int
    """Sampled for them."""


@dataclass(frozen=True)
class StageEnded:
    name: str


@dataclass(frozen=True)
class Evaluated:
    """By what was learned from ``finished`` iterations."""

    name: str
    finished: int
    result: EvaluationResult


@dataclass(frozen=True)
class IterationEnded:
    """It is committed."""

    index: int
    """From 0."""
    iterations: int
    """How many there are at most."""
    metrics: Metrics
    """By their names in ``core.metrics``."""


@dataclass(frozen=True)
class AlarmRaised:
    """A trainer found that what it learns from can no longer be trusted: the run ends early."""

    text: str


@dataclass(frozen=True)
class Message:
    """A line for people."""

    text: str
    title: bool = False
    """Begins a part of what is done."""


@dataclass(frozen=True)
class Note:
    """Something people may want to change; said once, however often it comes up."""

    text: str


@dataclass(frozen=True)
class RunEnded:
    """However it did."""

    result: Mapping[str, Any] | None
    """``result.json``; None if it was broken off."""


Event: TypeAlias = (
    RunBegan
    | StageBegan
    | StageAdvanced
    | Stepped
    | StageEnded
    | Evaluated
    | IterationEnded
    | AlarmRaised
    | Message
    | Note
    | RunEnded
)
Listener: TypeAlias = Callable[[Event], None]
"""Hears of every event, in order, at once: whatever takes long belongs into a thread."""


def each(*listeners: Listener) -> Listener:
    """A listener that passes on what it hears."""

    def heard(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return heard


def ignore(event: Event) -> None:
    """The listener of those who want to know nothing."""
