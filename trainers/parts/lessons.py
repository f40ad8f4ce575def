"""What recursive introspection learns from one state, and what it leaves alone."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ...core.types import Example, Judged, Step
from ..learning.examples import example
from .advantage import followed
from .credit import by_task, score

Filter: TypeAlias = Literal["all", "better", "best", "success"]
Baseline: TypeAlias = Literal["none", "constant", "state_mean", "state_max"]


@dataclass(frozen=True)
class Lesson:
    """What one state teaches: one of its candidates."""

    judged: Judged
    baseline: float
    invalid: float | None
    """As in ``reward``."""
    turn: int
    """Of the conversation."""
    conversation: list[Judged]
    """Its turns so far, and later ones as it goes on: what was carried on from each."""

    @property
    def later(self) -> list[float]:
        """Scores of the turns that followed; none if the conversation went on from another."""
        if self.turn < len(self.conversation) and self.conversation[self.turn] is self.judged:
            return [reward(one, self.invalid) for one in self.conversation[self.turn + 1 :]]
        return []

    def examples(self, tau: float, gamma: float) -> list[Example]:
        """Its turns, weighed by exp((return - baseline) / tau)."""
        trajectory = self.judged.trajectory
        earned = [reward(self.judged, self.invalid), *self.later]
        total = sum(gamma**k * r for k, r in enumerate(earned))
        after = followed(trajectory)
        return [
            example(
                trajectory,
                turn,
                # Held below what overflows; the learner says so if it is more than it can bear.
                math.exp(min((total * gamma ** after[turn] - self.baseline) / tau, 700)),
            )
            for turn in trajectory.turns
        ]


def reward(one: Judged, invalid: float | None) -> float:
    """The score; or ``invalid``, if it is given and the last turn holds no action, or no answer."""
    last = one.trajectory.steps[-1:]
    unread = any(step.action.invalid or step.answer == "" for step in last)
    return invalid if invalid is not None and unread else score(one)


def state_baseline(scores: Sequence[float], how: Baseline, constant: float) -> float:
    """What the candidates of one state are measured by."""
    match how:
        case "none":
            return 0.0
        case "constant":
            return constant
        case "state_mean":
            return sum(scores) / len(scores)
        case "state_max":
            return max(scores)


def sound(judged: Sequence[Judged]) -> list[list[Judged]]:
    """Groups of attempts at one task, without the undecided and the degenerate."""
    return by_task(
        one
        for one in judged
        if not any(map(degenerate, texts(one.trajectory.steps[one.trajectory.replayed :])))
    )


def kept(rule: Filter, earned: float, earlier: Sequence[float]) -> bool:
    """Whether a turn with this reward is learned, after turns with those."""
    match rule:
        case "all":
            return True
        case "better":
            return not earlier or earned > earlier[-1]
        case "best":
            return not earlier or earned >= max(earlier)
        case "success":
            return earned >= 1


def degenerate(text: str) -> bool:
    """A word repeated more than 150 times, or one longer than 300 characters."""
    counts = Counter(text.split())
    return any(count > 150 or len(word) > 300 for word, count in counts.items())


def texts(steps: Iterable[Step]) -> list[str]:
    """Answers, by the actions in each; where none could be read, by what was said instead: no two
    of those are the same."""
    found: list[str] = []
    for step in steps:
        action = step.action
        text = (action.completion.text or action.invalid) if action.invalid else action.text
        if action.place and found:
            found[-1] += f"\n{text}"
        else:
            found.append(text)
    return found
