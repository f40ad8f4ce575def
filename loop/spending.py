"""What training has cost, and which episodes its budget still covers."""

import math
import statistics
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple, Self

from ..core.config import Budget
from ..core.files import read_json
from ..core.store.folder import RunFolder, iteration_name
from ..core.types import Judged, Start
from .evaluate import tokens_sampled

KEYS = ("environment_steps", "tokens")
"""Of the metrics, in the order of ``Costs``."""
LEAST = 0.1
"""An iteration is begun where the budget covers this share of what one costs, or more."""


class Costs(NamedTuple):
    steps: float = 0.0
    """Of environments, those that were replayed included."""
    tokens: float = 0.0
    """Sampled ones."""

    def and_more(self, other: "Costs", times: float = 1.0) -> Self:
        pairs = zip(self, other, strict=True)
        return type(self)(*(mine + times * theirs for mine, theirs in pairs))

    def share(self, budget: Budget) -> float:
        return budget.share(*self)


def committed(kept: RunFolder, begin: int = 0) -> Costs:
    """Of the stored iterations from ``begin`` on."""
    stored = [
        read_json(kept.path(iteration_name(k)) / "metrics.json")
        for k in range(begin, kept.finished)
    ]
    return Costs(*(sum(m[f"rollout/{key}"] for m in stored) for key in KEYS))


def room(spent: Costs, each: Costs, budget: Budget) -> float:
    """How many iterations the budget still covers; infinite where nobody can tell."""
    left, cost = 1 - spent.share(budget), each.share(budget)
    return 0.0 if left <= 0 else left / cost if cost else math.inf


def costs_of(played: Sequence[Judged], asked: float = 0.0) -> Costs:
    """``asked``: tokens that were sampled outside of episodes."""
    trajectories = [one.trajectory for one in played]
    steps = sum(t.executed for t in trajectories)
    return Costs(float(steps), float(tokens_sampled(trajectories) + asked))


def covered(
    begin: Sequence[Start],
    spent: Costs,
    budget: Budget,
    like: Sequence[Judged],
    asks: bool,
    replays: bool = True,
) -> list[Start]:
    """The first of the episodes, until the budget can be expected to be spent; groups are whole.

    How many actions an episode will take, where it is not said, and how many tokens each, is
    what those in ``like`` took on average: of nothing known, one action and no token. So it hangs
    on nothing but what was played, and is the same whenever a run is resumed.

    Args:
        asks: whether who plays samples tokens.
        replays: whether prefixes are replayed, and not gone on from.
    """
    own = [one.trajectory.steps[one.trajectory.replayed :] for one in like]
    answers = sum(len(one.trajectory.turns) for one in like)
    per_answer = sum(map(len, own)) / answers if answers else 1.0
    sampled = [
        len(step.action.completion.token_ids)
        for steps in own
        for step in steps
        if step.action.completion.token_ids
    ]
    each = statistics.fmean(sampled) if sampled and asks else 0.0
    usual = statistics.fmean(map(len, own)) if own else 1.0
    kept: list[Start] = []
    for _, group in groupby(begin, key=lambda start: (start.task.id, start.seed)):
        if spent.share(budget) >= 1:
            break
        for start in group:
            left = start.task.max_steps - len(start.prefix)
            actions = min(left, usual if start.turns is None else start.turns * per_answer)
            again = len(start.prefix) if replays else 0
            spent = spent.and_more(Costs(again + actions, each * actions / per_answer))
            kept.append(start)
    return kept
