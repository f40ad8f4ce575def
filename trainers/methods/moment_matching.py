"""Distillation by moments: give a bounded critic nothing to tell the policy and its teacher by."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field

from ...core.models.open import same_vocabulary
from ...core.protocols import Context, Plan
from ...core.types import Aggregation, Batch, Judged, Start, Stop
from ..learning.examples import imitate
from ..learning.loss import ContestedGap, MomentGap
from ..parts.credit import TrainerConfig, key
from ..parts.critic import Critic, CriticConfig


class MomentMatchingConfig(TrainerConfig):
    teacher: str
    """Whose distributions are learned, by name, folder or hub id; of the policy's vocabulary."""
    aggregation: Aggregation = "token-mean"
    mode: Literal["critics", "exact"] = "critics"
    """Critics that learn, or the best bounded critic in closed form: total variation."""
    beta: float = Field(default=1.0, ge=0)
    """What the gap on the policy's own responses counts, beside that on the teacher's; at 0 it
    makes none."""
    critic: CriticConfig = CriticConfig()


class MomentMatching:
    """AMMD: adversarial moment-matching distillation (Jia 2024, arXiv:2406.02959).

    The teacher and the policy answer the same tasks. On either's states the policy's expectation of
    a critic over all next tokens is drawn to the teacher's; a critic for each learns what still
    tells them apart. Who answered well does not matter, and no reward is looked at.

    Departures: written from the performance-difference lemma, as no code was released. The two gaps
    are descended in turn, one optimiser step after another; a token answers for later gaps of its
    own response, not of later turns, and nothing is discounted; gaps are means over tokens. The
    states that are not the policy's are the teacher's own, never a data set's, and ``beta`` stands
    at the policy's. The critics are small networks on what the policy's head reads, bounded by
    tanh, with a step before each of the policy's.
    """

    Config = MomentMatchingConfig

    def __init__(self, config: MomentMatchingConfig, context: Context) -> None:
        """Raises: ModelError: the teacher cannot be opened, or has another vocabulary."""
        self._teacher = context.model_of(config.teacher)
        same_vocabulary(context.base, self._teacher)
        self._config = config
        self._context = context
        self._critics = {own: Critic(config.critic, context.seed + own) for own in (False, True)}

    @property
    def plan(self) -> Plan:
        config = self._config
        return Plan(config.tasks_per_iteration, config.attempts_per_task, player=config.teacher)

    async def batches(self, judged: Sequence[Judged]) -> list[Batch]:
        config = self._config
        given = self._batch(judged, False, 1.0)
        if not config.beta:
            return given
        asked = [
            Start(one.trajectory.task, one.trajectory.seed, one.trajectory.attempt)
            for one in judged
        ]
        mine = self._batch(await self._context.attempt(asked), True, config.beta)
        turns = [replace(batch, epochs=1) for batch in given + mine]
        return turns * config.epochs

    def _batch(self, judged: Sequence[Judged], own: bool, weight: float) -> list[Batch]:
        config = self._config
        examples = tuple(
            example
            for one in sorted(judged, key=key)
            if one.trajectory.stop != Stop.FAILED
            for example in imitate(one.trajectory)
        )
        form = (config.aggregation, config.length)
        if config.mode == "exact":
            loss: MomentGap = MomentGap(self._teacher, own, weight, None, *form)
        else:
            loss = ContestedGap(self._teacher, own, weight, self._critics[own], *form)
        return [Batch(loss, examples, config.epochs)] if examples else []

    def save(self, folder: Path, images: Path) -> None:
        for own, critic in self._critics.items():
            critic.save(folder / f"critic{int(own)}.safetensors")

    def restore(self, folder: Path) -> None:
        for own, critic in self._critics.items():
            critic.restore(folder / f"critic{int(own)}.safetensors")
