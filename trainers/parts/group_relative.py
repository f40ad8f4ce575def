"""Group-relative policy gradients: attempts at one task against one another."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from ...core.config import Config
from ...core.protocols import Context, Plan
from ...core.types import Aggregation, Batch, Example, Judged, Need
from ..learning.examples import reinforce
from ..learning.loss import KL, Clip, CovarianceClip
from .advantage import Baseline, advantages, divergences, own_turns, step_advantages
from .credit import by_task, score

LENGTH = Field(default=64, ge=1)
"""What unbiased methods divide token sums by: as a rule ``policy.max_tokens``."""


class GroupConfig(Config):
    """What the configs of all group-relative methods have; at first GRPO's own."""

    tasks_per_iteration: int = Field(default=64, ge=1)
    attempts_per_task: int = Field(default=8, ge=2)
    """The size of a group."""
    epochs: int = Field(default=1, ge=1)
    """Passes over an iteration's examples."""
    turns: int | None = Field(default=None, ge=1)
    """The most actions of an episode that is learned; None: as many as the task allows."""
    baseline: Baseline = "grpo"
    """How a group's scores become advantages."""
    aggregation: Aggregation = "seq-mean-token-mean"
    """How token losses become one number; a sequence is one turn."""
    length: int = Field(default=1, ge=1)
    """The constant, in tokens, of ``aggregation: seq-mean-token-sum-norm``."""
    low: float = Field(default=0.2, ge=0, lt=1)
    """The ratio to the policy that sampled is cut at 1 - low and 1 + high."""
    high: float = Field(default=0.2, ge=0)
    dual: float | None = Field(default=None, gt=1)
    """Bounds the loss of tokens with a negative advantage A by -dual * A."""
    kl: float = Field(default=0.0, ge=0)
    """What a nat of divergence from the base costs."""
    kl_in: Literal["loss", "reward"] = "loss"
    estimator: KL = "k3"
    """How the divergence is estimated."""
    entropy_share: float = Field(default=0.0, ge=0, le=1)
    """The share of tokens that are left out as they would cost the most entropy (Clip-Cov)."""
    entropy_bounds: tuple[float, float] = (2.0, 60.0)
    """Such tokens have a covariance of advantage and log-probability between these."""
    step_weight: float = Field(default=0.0, ge=0)
    """What a step's advantage among steps from the same observation counts beside the episode's
    (GiGPO's omega); 0: there are no step groups."""
    gamma: float = Field(default=0.95, ge=0, le=1)
    """Discount, per step, of the return in step groups."""


class GroupRelative:
    """What GRPO and those built on it share: groups, their advantages, the clipped loss."""

    Config: type[GroupConfig] = GroupConfig

    def __init__(self, config: GroupConfig, context: Context) -> None:
        self._config = config
        self._context = context

    @property
    def plan(self) -> Plan:
        config = self._config
        return Plan(config.tasks_per_iteration, config.attempts_per_task, config.turns)

    async def batches(self, judged: Sequence[Judged]) -> list[Batch]:
        groups = by_task(judged)
        return self.learned(groups, await self.rewards(groups))

    async def rewards(self, groups: Sequence[Sequence[Judged]]) -> list[list[float]]:
        """The judge's scores, per group, less what drifting from the base costs in the reward."""
        config = self._config
        if not (config.kl and config.kl_in == "reward"):
            return [[score(one) for one in group] for group in groups]
        costs = await divergences(self._context, groups, config.estimator)
        return [[score(one) - config.kl * costs[id(one)] for one in group] for group in groups]

    def learned(
        self, groups: Sequence[Sequence[Judged]], rewards: Sequence[Sequence[float]]
    ) -> list[Batch]:
        """One batch of all groups; none if there is nothing to be learned from it."""
        pairs = zip(groups, rewards, strict=True)
        examples = [example for group, mine in pairs for example in self.examples(group, mine)]
        loss = self.loss()
        if not examples or not (Need.REFERENCE in loss.needs or any(e.advantage for e in examples)):
            return []
        return [Batch(loss, tuple(examples), self._config.epochs)]

    def examples(self, group: Sequence[Judged], rewards: Sequence[float]) -> list[Example]:
        """All turns of a group's attempts, with their advantages."""
        config = self._config
        whole = advantages(rewards, config.baseline)
        turns = [
            [advantage] * len(own_turns(one)) for one, advantage in zip(group, whole, strict=True)
        ]
        if config.step_weight:
            steps = step_advantages(group, rewards, config.gamma, config.baseline)
            turns = [
                [a + config.step_weight * b for a, b in zip(mine, more, strict=True)]
                for mine, more in zip(turns, steps, strict=True)
            ]
        return [
            example
            for one, mine in zip(group, turns, strict=True)
            for example in reinforce(one.trajectory, mine)
        ]

    def loss(self, weight: float = 1.0) -> Clip:
        config = self._config
        settings: dict[str, Any] = {
            "low": config.low,
            "high": config.high,
            "dual": config.dual,
            "kl": config.kl if config.kl_in == "loss" else 0.0,
            "estimator": config.estimator,
            "aggregation": config.aggregation,
            "length": config.length,
            "weight": weight,
        }
        if not config.entropy_share:
            return Clip(**settings)
        low, high = config.entropy_bounds
        return CovarianceClip(**settings, share=config.entropy_share, above=low, below=high)
