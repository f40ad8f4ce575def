"""What the single checks look at."""

from dataclasses import dataclass, field
from typing import Any

from ...core.config import Fleet
from ...core.hosting.pool import Worlds
from ...core.types import Task
from .episodes import (
    Chooser,
    Episode,
    Stopwatch,
    some,
    stranger,
)

UNANSWERED = "the episodes to look at could not be played"


class Skipped(Exception):
    """A check has nothing to look at; the message says why."""


@dataclass
class Examination:
    """What the single checks look at."""

    name: str
    config: dict[str, Any]
    fleet: Fleet
    episodes: int
    resets: int
    here: Worlds
    """Where episodes are played."""
    there: Worlds
    """In another process."""
    watch: Stopwatch
    played: list[Episode] = field(default_factory=list[Episode])
    answered: bool = False
    late: str = ""


def has(exam: Examination, ability: str) -> bool:
    return ability in exam.here.abilities


async def some_tasks(exam: Examination, split: str) -> list[Task]:
    return await some(exam.here.tasks(split), exam.episodes)


def chooser(exam: Examination, seed: int) -> Chooser:
    return stranger(has(exam, "random"), seed)


def rule_of(exam: Examination) -> str:
    """How far the world says that it repeats itself. Raises: Skipped: not at all."""
    rule = exam.here.spec.repeatable
    if rule == "no":
        raise Skipped("the world says that nothing of it repeats itself")
    return rule
