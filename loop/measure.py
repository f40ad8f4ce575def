"""What an iteration is measured by, of what was played and learned in it."""

import time
from collections.abc import Sequence

from ..core.play.judging import BROKEN
from ..core.play.rollout import failures_by_name
from ..core.types import Judged, Metrics, Stop
from .evaluate import tokens_sampled

COUNTED = ("train/examples", "train/rows", "train/updates", "train/tokens", "train/prefix_breaks")
"""What adds up over an iteration's batches; of other metrics the mean over updates is told."""


def together(learned: Sequence[Metrics]) -> Metrics:
    """The metrics of an iteration's batches as those of one."""
    total: Metrics = {key: 0.0 for key in ("train/examples", "train/tokens")}
    updates = sum(one.get("train/updates", 1.0) for one in learned)
    for one in learned:
        share = one.get("train/updates", 1.0) / updates if updates else 1 / len(learned)
        for key, value in one.items():
            total[key] = total.get(key, 0.0) + (value if key in COUNTED else share * value)
    return total | {"train/total_tokens": total["train/tokens"]}


def summary(played: Sequence[Judged], asked: int = 0) -> Metrics:
    """What was played, in numbers; nothing undefined is written down as a number.

    ``asked``: tokens that were sampled outside of episodes.
    """
    trajectories = [j.trajectory for j in played]
    scores = [j.verdict.score for j in played if j.verdict.score is not None]
    own = [t.steps[turn] for t in trajectories for turn in t.turns]
    actions = [step.action for t in trajectories for step in t.steps[t.replayed :]]
    metrics: Metrics = {
        "rollout/episodes": float(len(played)),
        "rollout/environment_steps": float(sum(t.executed for t in trajectories)),
        "rollout/invalid": float(sum(bool(action.invalid) for action in actions)),
        "rollout/tokens": float(tokens_sampled(trajectories) + asked),
        "rollout/failed": float(sum(t.stop == Stop.FAILED for t in trajectories)),
        "judge/undecided": float(len(played) - len(scores)),
        "judge/broken": float(sum(j.verdict.judge == BROKEN for j in played)),
    }
    metrics |= {f"failures/{k}": float(v) for k, v in failures_by_name(trajectories).items()}
    if played:
        metrics["rollout/success"] = sum(t.success for t in trajectories) / len(played)
        metrics["rollout/reward"] = sum(t.reward for t in trajectories) / len(played)
    if scores:
        metrics["judge/score"] = sum(scores) / len(scores)
    if own:
        cut = sum(step.action.completion.finish == "length" for step in own)
        metrics["rollout/cut_share"] = cut / len(own)
        metrics["rollout/left_out"] = sum(bool(s.action.left_out) for s in own) / len(own)
    return metrics


def staleness(played: Sequence[Judged], version: int) -> Metrics:
    """How many iterations the policy has learned from since it said what it learns from now."""
    own = [
        version - step.action.completion.version
        for one in played
        for step in one.trajectory.steps[one.trajectory.replayed :]
        if step.action.completion.version >= 0
    ]
    if not own:
        return {}
    return {"rollout/staleness": sum(own) / len(own), "rollout/staleness_max": float(max(own))}


class Clock:
    """Seconds since it was last asked."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def lap(self) -> float:
        now = time.monotonic()
        gone, self._since = now - self._since, now
        return gone
