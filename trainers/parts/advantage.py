"""From scores of a group to advantages: of attempts, of single turns, less what drifting costs."""

import math
import statistics
from collections.abc import Sequence
from typing import Literal, TypeAlias

from ...core.play.asking import score_all
from ...core.protocols import Context
from ...core.types import Judged, Observation, Step, Trajectory
from ..learning.examples import asked
from ..learning.loss import KL

Baseline: TypeAlias = Literal["grpo", "rloo", "dr_grpo"]
"""How a group's rewards become advantages, as in ``advantages``."""


def advantages(rewards: Sequence[float], how: Baseline) -> list[float]:
    """(G,) rewards of one group to (G,) advantages.

    ``grpo``: less their mean, over their standard deviation (of G - 1 degrees of freedom) plus
    1e-6 (Shao et al. 2024, arXiv:2402.03300). ``dr_grpo``: less their mean only (Liu et al. 2025,
    arXiv:2503.20783). ``rloo``: each less the mean of the others (Ahmadian et al. 2024,
    arXiv:2402.14740). In a group of one there is nothing to compare with, and the advantage is 0.
    """
    size = len(rewards)
    if size < 2:
        return [0.0] * size
    mean = statistics.fmean(rewards)
    # Exactly 0 where all are equal, whatever the mean was rounded to.
    centred = [reward - mean if min(rewards) < max(rewards) else 0.0 for reward in rewards]
    match how:
        case "grpo":
            deviation = statistics.stdev(rewards)
            return [gap / (deviation + 1e-6) for gap in centred]
        case "rloo":
            return [gap * size / (size - 1) for gap in centred]
        case "dr_grpo":
            return centred


def step_advantages(
    group: Sequence[Judged], rewards: Sequence[float], gamma: float, how: Baseline
) -> list[list[float]]:
    """Per attempt, per own turn: its discounted return among all turns with its observation.

    The reward is paid with the last turn. A turn whose observation nobody else saw gets 0.
    """
    returns: dict[Observation, list[float]] = {}
    for one, reward in zip(group, rewards, strict=True):
        after = followed(one.trajectory)
        for turn, step in own_turns(one):
            returns.setdefault(step.observation, []).append(gamma ** after[turn] * reward)
    remaining = {seen: iter(advantages(those, how)) for seen, those in returns.items()}
    return [[next(remaining[step.observation]) for _, step in own_turns(one)] for one in group]


def followed(trajectory: Trajectory) -> dict[int, int]:
    """By the step that an answer begins with: how many answers follow."""
    return {turn: k for k, turn in enumerate(reversed(trajectory.answers))}


def own_turns(one: Judged) -> list[tuple[int, Step]]:
    return [(turn, one.trajectory.steps[turn]) for turn in one.trajectory.turns]


async def divergences(
    context: Context, groups: Sequence[Sequence[Judged]], estimator: KL
) -> dict[int, float]:
    """By ``id`` of the judged: estimated nats from the frozen base, summed over its own tokens.

    What the base cannot score costs nothing.

    Raises:
        PolicyError: that is more than half of it.
    """
    every = [one for group in groups for one in group]
    turns = [(one, turn, step) for one in every for turn, step in own_turns(one)]
    questions = [(asked(one.trajectory, turn), step.action.completion) for one, turn, step in turns]
    scored = await score_all(await context.open("base"), questions)
    found = {id(one): 0.0 for one in every}
    for (one, _, step), base in zip(turns, scored, strict=True):
        if base is not None:
            pairs = zip(base.logprobs, step.action.completion.logprobs, strict=True)
            found[id(one)] += sum(estimated(theirs - own, estimator) for theirs, own in pairs)
    return found


def estimated(gap: float, estimator: KL) -> float:
    """``loss.kl`` of one token, from the gap log reference - log pi."""
    match estimator:
        case "k1":
            return -gap
        case "k2":
            return gap * gap / 2
        case "k3":
            return math.expm1(gap) - gap
