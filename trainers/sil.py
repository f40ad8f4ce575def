"""Classic self-imitation: repeat what once went better than one would have thought."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import Field

from ..core.files import read_json, write_json
from ..core.protocols import Context, Plan
from ..core.seeds import derive
from ..core.store import TRAJECTORIES, read_trajectories, write_trajectories
from ..core.types import Aggregation, Batch, Example, Judged
from .advantage import own_turns
from .credit import TrainerConfig, by_task, example, reinforce, score
from .loss import NLL, Clip
from .replay import prioritised, recent, returns
from .value import Value, ValueConfig

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
    advantage (R - V)_+, at most 1, and V is drawn up to R there, never down.

    Departures: the entropy bonus and the bound on -log pi are left out; V is a network of its own,
    learned before the advantages are taken in the first iteration and after them in later ones.
    """

    Config = SILConfig

    def __init__(self, config: SILConfig, context: Context) -> None:
        self._config = config
        self._context = context
        self._value = Value(config.value, context.base, context.seed)
        self._kept: list[Judged] = []
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
        batches = await loop.run_in_executor(None, self._learned, played)
        won = [one for one in played if score(one) > 0]
        self._kept = recent([*self._kept, *won], config.buffer_size)
        for k in range(config.replays if self._kept else 0):
            batches += await loop.run_in_executor(None, self._again, k)
        self._step += 1
        return batches

    def _learned(self, played: Sequence[Judged]) -> list[Batch]:
        """Of new episodes: every action, by how much better it went than expected."""
        config, agent = self._config, self._context.agent
        actions = [
            (made, worth)
            for one in played
            for made, worth in zip(
                reinforce(agent, one.trajectory, [0.0] * len(own_turns(one))),
                returns(one, config.gamma),
                strict=True,
            )
        ]
        prompts, worths = [made.prompt for made, _ in actions], [worth for _, worth in actions]
        learn = (prompts, worths, [1.0] * len(worths), "both")
        if not self._value.net.updates:
            self._value.learn(*learn)
        values = self._value.values(prompts)
        if self._step:
            self._value.learn(*learn)
        examples = tuple(
            replace(made, advantage=worth - value)
            for (made, worth), value in zip(actions, values, strict=True)
        )
        loss = Clip(aggregation=config.aggregation, length=config.length)
        return [Batch(loss, examples, config.epochs)]

    def _again(self, number: int) -> list[Batch]:
        """Of remembered ones: some that went better than one would expect today."""
        config, agent = self._config, self._context.agent
        steps = [
            (one, turn, worth)
            for one in self._kept
            for (turn, _), worth in zip(own_turns(one), returns(one, config.gamma), strict=True)
        ]
        made = [example(agent, one.trajectory, turn, 1.0) for one, turn, _ in steps]
        values = self._value.values([one.prompt for one in made])
        gaps = [max(0.0, worth - v) for (_, _, worth), v in zip(steps, values, strict=True)]
        seed = derive(self._context.seed, "sil", self._step, number)
        size = min(config.replay_size, len(steps))
        drawn = prioritised(gaps, size, config.priority, config.correction, seed)
        prompts = [made[k].prompt for k, _ in drawn]
        worths, counts = [steps[k][2] for k, _ in drawn], [w for _, w in drawn]
        if config.value_weight:
            scaled = [config.value_weight * w for w in counts]
            self._value.learn(prompts, worths, scaled, "above")
        examples: list[Example] = [
            replace(made[k], advantage=w * min(1.0, gaps[k])) for k, w in drawn if gaps[k] > 0
        ]
        loss = NLL(config.aggregation, config.length)
        return [Batch(loss, tuple(examples))] if examples else []

    def save(self, folder: Path, images: Path) -> None:
        write_json(folder / "sil.json", {"step": self._step})
        write_trajectories(folder / TRAJECTORIES, self._kept, images)
        self._value.net.save(folder / FILE)

    def restore(self, folder: Path) -> None:
        self._step = read_json(folder / "sil.json")["step"]
        self._kept = read_trajectories(folder / TRAJECTORIES)
        self._value.net.restore(folder / FILE)
