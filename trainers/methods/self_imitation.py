"""Self-imitation of recent successes beside group-relative learning: SPEAR."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import Field

from ...core.files import read_json, write_json
from ...core.protocols import Context
from ...core.seeds import derive
from ...core.types import Aggregation, Batch, Judged
from ..learning.examples import reinforce
from ..parts.advantage import Baseline, advantages, own_turns
from ..parts.credit import by_task
from ..parts.group_relative import LENGTH, GroupConfig, GroupRelative
from ..parts.replay import Replay, ReplayEntry


class SelfImitationConfig(GroupConfig):
    baseline: Baseline = "dr_grpo"
    aggregation: Aggregation = "seq-mean-token-sum-norm"
    length: int = LENGTH
    high: float = Field(default=0.28, ge=0)
    dual: float | None = Field(default=10.0, gt=1)
    entropy_share: float = Field(default=0.02, ge=0, le=1)
    buffer_size: int = Field(default=2048, ge=1)
    """The most episodes replayed at once; nothing is until 1.5 times as many are worth it."""
    baseline_size: int = Field(default=10_240, ge=1)
    """The median over about so many recent groups is what a replayed episode is measured by."""
    tolerate: int = Field(default=5, ge=0)
    """Iterations after which an episode is too old to be repeated."""
    imitation: float = Field(default=1.0, ge=0)
    """The weight of self-imitation once it has warmed up."""
    imitation_warmup: int = Field(default=200, ge=0)
    """Iterations over which that weight rises from 0, along a cosine."""
    tool_reward: float = Field(default=0.1, ge=0)
    """What every action earns at first beside the score, 1 in all at most: exploring pays."""
    tool_decay: int = Field(default=200, ge=0)
    """Iterations over which that reward falls to 0, along a cosine."""


class SelfImitation(GroupRelative):
    """Group-relative learning, and again and again the episodes that beat the groups of late.

    SPEAR (Qin et al. 2025, arXiv:2509.22601) on its Dr.BoT base: no KL, clip-higher, dual clip,
    no division by the deviation, covariance clipping; with ``step_weight`` on GiGPO. Episodes enter
    the buffer when they beat their own group, and leave it to be repeated when they beat the median
    of recent groups too: the difference is their advantage then, and their old log-probabilities
    are those they were sampled with. Replay is a batch of its own, after the new episodes'.

    Departures: Dr.BoT's filters (overlong, void and repetitive samples, the quarter of groups that
    vary least) and the rewards of format and for valid actions are left to world and judge; every
    action counts as a use of tools, and episodes without one may be repeated; what is too old
    leaves the buffer before it is read, not after; of turns, attempts and step groups as in
    ``GRPO``. The defaults suit runs of thousands of episodes an iteration; in small ones lower
    ``buffer_size``, ``imitation_warmup``, ``tool_decay``.
    """

    Config = SelfImitationConfig

    def __init__(self, config: SelfImitationConfig, context: Context) -> None:
        super().__init__(config, context)
        self._mine = config
        self._step = 0
        self._replay = Replay(config.buffer_size, config.baseline_size, config.tolerate)

    async def batches(self, judged: Sequence[Judged]) -> list[Batch]:
        groups = by_task(judged)
        rewards = await self.rewards(groups)
        own = self.learned(groups, rewards)
        again = self._again()
        self._remember(groups, rewards)
        self._step += 1
        if not (own and again):
            return own + again
        # Within each epoch the new episodes, then the old.
        turns = [replace(batch, epochs=1) for batch in own + again]
        return turns * self._config.epochs

    async def rewards(self, groups: Sequence[Sequence[Judged]]) -> list[list[float]]:
        config = self._mine
        share = falling(self._step, config.tool_decay)
        return [
            [
                reward + share * min(1.0, config.tool_reward * len(own_turns(one)))
                for one, reward in zip(group, mine, strict=True)
            ]
            for group, mine in zip(groups, await super().rewards(groups), strict=True)
        ]

    def _again(self) -> list[Batch]:
        """What is replayed now, before this iteration's episodes are remembered."""
        config = self._mine
        weight = config.imitation * rising(self._step, config.imitation_warmup)
        self._replay.expire(self._step)
        taken = self._replay.take(derive(self._context.seed, "replay", self._step))
        examples = [
            example
            for memory, advantage in taken
            for example in reinforce(
                memory.judged.trajectory, [advantage] * len(own_turns(memory.judged))
            )
        ]
        if not (examples and weight):
            return []
        loss = replace(self.loss(weight), kl=0.0)
        return [Batch(loss, tuple(examples), config.epochs)]

    def _remember(
        self, groups: Sequence[Sequence[Judged]], rewards: Sequence[Sequence[float]]
    ) -> None:
        replay, step = self._replay, self._step
        replay.observe(step, [statistics.fmean(mine) for mine in rewards])
        for group, mine in zip(groups, rewards, strict=True):
            better = advantages(mine, self._config.baseline)
            for one, reward, advantage in zip(group, mine, better, strict=True):
                if advantage > 0:
                    replay.memories.append(ReplayEntry(one, reward, step))

    def save(self, folder: Path, images: Path) -> None:
        write_json(folder / "self_imitation.json", {"step": self._step})
        self._replay.save(folder, images)

    def restore(self, folder: Path) -> None:
        self._step = read_json(folder / "self_imitation.json")["step"]
        self._replay.restore(folder)


def rising(step: int, over: int) -> float:
    """From 0 to 1 along half a cosine, then 1."""
    return (1 - math.cos(math.pi * step / over)) / 2 if step < over else 1.0


def falling(step: int, over: int) -> float:
    """From 1 to 0 along half a cosine, then 0."""
    return 1 - rising(step, over)
