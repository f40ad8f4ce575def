"""Classic self-imitation: repeat what once went better than one would have thought."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import Field

from ...core.files import read_json, write_json
from ...core.protocols import Context, Plan
from ...core.seeds import derive
from ...core.store import read_trajectories, write_trajectories
from ...core.types import Aggregation, Batch, Example, Judged
from ..learning.examples import example, reinforce
from ..learning.loss import NLL, Clip
from ..parts.advantage import own_turns
from ..parts.credit import TrainerConfig, by_task, score
from ..parts.replay import prioritised, recent, returns
from ..parts.value import Value, ValueConfig

FILE = "value.safetensors"


class SILConfig(TrainerConfig):
    aggregation: Aggregation = "seq-mean-token-sum-norm"
    length: int = Field(default=64, ge=1)
    """What token sums are divided by: as a rule ``policy.max_tokens``."""
    gamma: float = Field(default=0.99, ge=0, le=1)
    """Discount, per action, of an episode's score, which is paid with its last."""
    buffer_size: int = Field(default=100_000, ge=1)
    """Actions that are remembered; the oldest episodes go first."""
    replays: int = Field(default=4, ge=0)
    """Updates from the buffer per iteration."""
    replay_size: int = Field(default=512, ge=1)
    """Actions of each."""
    priority: float = Field(default=0.6, ge=0)
    """Exponent of (R - V)_+ in the chance of being drawn."""
    correction: float = Field(default=1.0, ge=0)
    """Exponent of the importance weights that make up for it."""
    value_weight: float = Field(default=0.01, ge=0)
    """What (R - V)_+^2 / 2 of replayed states counts."""
    value: ValueConfig = ValueConfig()


class SIL:
    """Self-imitation learning (Oh et al. 2018, arXiv:1806.05635) on an actor-critic.

    An iteration's actions are reinforced by R - V(state). Episodes with a score above 0 are
    remembered action by action; those with R > V are drawn by priority and imitated with the
    advantage (R - V)_+, at most 1, and V is drawn up to R there.

    Departures: the on-policy part is PPO's clipped surrogate, not A2C. R is the judge's score,
    paid with the last action and discounted, not the sum of rewards. The entropy bonus, the bound
    on -log pi and the normaliser of at least 64 are left out; V is a network of its own, learned
    before the first advantages are taken, later after them. An action is a turn: its token losses
    are summed and divided by ``length``.
    """

    Config = SILConfig

    def __init__(self, config: SILConfig, context: Context) -> None:
        self._config = config
        self._context = context
        self._value = Value(config.value, context.base, context.seed)
        self._kept: list[Judged] = []
        self._gaps: list[list[float]] = []
        """Of their actions: R - V, as it was last."""
        self._step = 0

    @property
    def plan(self) -> Plan:
        return Plan(self._config.tasks_per_iteration, self._config.attempts_per_task)

    async def batches(self, judged: Sequence[Judged]) -> list[Batch]:
        config = self._config
        played = [one for group in by_task(judged) for one in group]
        if not any(own_turns(one) for one in played):
            return []
        loop = asyncio.get_running_loop()
        batches, gaps = await loop.run_in_executor(None, self._learned, played)
        won = [k for k, one in enumerate(played) if score(one) > 0]
        self._kept += [played[k] for k in won]
        self._gaps += [gaps[k] for k in won]
        count = recent([len(mine) for mine in self._gaps], config.buffer_size)
        self._kept, self._gaps = self._kept[-count:], self._gaps[-count:]
        for k in range(config.replays if self._kept else 0):
            batches += await loop.run_in_executor(None, self._again, k)
        self._step += 1
        return batches

    def _learned(self, played: Sequence[Judged]) -> tuple[list[Batch], list[list[float]]]:
        """Of new episodes: every action, by how much better it went than expected; and R - V."""
        config = self._config
        worths = [returns(one, config.gamma) for one in played]
        unweighted = [
            example
            for one, mine in zip(played, worths, strict=True)
            for example in reinforce(one.trajectory, [0.0] * len(mine))
        ]
        prompts, flat = (
            [one.prompt for one in unweighted],
            [worth for mine in worths for worth in mine],
        )
        if not self._value.net.updates:
            self._value.learn(prompts, flat, [1.0] * len(flat), "both")
        values = self._value.values(prompts)
        if self._step:
            self._value.learn(prompts, flat, [1.0] * len(flat), "both")
        above = [worth - value for worth, value in zip(flat, values, strict=True)]
        examples = tuple(replace(a, advantage=b) for a, b in zip(unweighted, above, strict=True))
        loss = Clip(aggregation=config.aggregation, length=config.length)
        left = iter(above)
        gaps = [[next(left) for _ in mine] for mine in worths]
        return [Batch(loss, examples, config.epochs)], gaps

    def _again(self, number: int) -> list[Batch]:
        """Of remembered ones: some that went better than one would expect today.

        They are drawn by what was expected when they were last looked at.
        """
        config = self._config
        places = [(k, turn) for k, mine in enumerate(self._gaps) for turn in range(len(mine))]
        old = [max(0.0, self._gaps[k][turn]) for k, turn in places]
        seed = derive(self._context.seed, "sil", self._step, number)
        size = min(config.replay_size, len(places))
        drawn = prioritised(old, size, config.priority, config.correction, seed)
        looked = sorted({place for place, _ in drawn})
        remembered: dict[int, Example] = {}
        worth: dict[int, float] = {}
        for place in looked:
            one, turn = self._kept[places[place][0]], places[place][1]
            at = one.trajectory.turns[turn]
            remembered[place] = example(one.trajectory, at, 1.0)
            worth[place] = returns(one, config.gamma)[turn]
        values = self._value.values([remembered[place].prompt for place in looked])
        gaps = {place: worth[place] - v for place, v in zip(looked, values, strict=True)}
        for place, gap in gaps.items():
            self._gaps[places[place][0]][places[place][1]] = gap
        if config.value_weight:
            scaled = [config.value_weight * w for _, w in drawn]
            prompts = [remembered[place].prompt for place, _ in drawn]
            self._value.learn(prompts, [worth[place] for place, _ in drawn], scaled, "above")
        better = [(remembered[p], w * min(1.0, gaps[p])) for p, w in drawn if gaps[p] > 0]
        examples = tuple(replace(one, advantage=advantage) for one, advantage in better)
        return [Batch(NLL(config.aggregation, config.length), examples)] if examples else []

    def save(self, folder: Path, images: Path) -> None:
        write_json(folder / "sil.json", {"step": self._step, "gaps": self._gaps})
        write_trajectories(folder, self._kept, images)
        self._value.net.save(folder / FILE)

    def restore(self, folder: Path) -> None:
        state = read_json(folder / "sil.json")
        self._step, self._gaps = state["step"], state["gaps"]
        self._kept = read_trajectories(folder)
        self._value.net.restore(folder / FILE)
