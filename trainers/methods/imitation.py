"""Behaviour cloning: of the world's expert, of stored trajectories, of the policy's successes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from ...core.protocols import Context, Plan
from ...core.types import Batch, Example, Judged, Stop
from ..learning.examples import imitate
from ..parts.credit import TrainerConfig, by_task, score, stored
from ..parts.lines import read_conversations


class ImitationConfig(TrainerConfig):
    source: Literal["expert", "file", "self", "conversations"] = "expert"
    """Who is imitated: the world's expert, ``trajectories``, the policy itself, or whoever answers
    in ``conversations``."""
    trajectories: str = ""
    """With ``source: file``: a folder of episodes, as runs store them (an iteration's)."""
    conversations: str = ""
    """With ``source: conversations``: JSON lines {"messages": [{"role": "user", "content": words},
    ..., {"role": "assistant", ...}]}, of which the last message is learned. No world is played."""
    threshold: float = Field(default=1.0, ge=0, le=1)
    """The least score of a trajectory that is imitated."""

    @model_validator(mode="after")
    def _file(self) -> Self:
        if (self.source == "file") != bool(self.trajectories):
            raise ValueError("source: file and trajectories: PATH go together")
        if (self.source == "conversations") != bool(self.conversations):
            raise ValueError("source: conversations and conversations: PATH go together")
        if self.conversations:
            read_conversations(Path(self.conversations))
        return self


class Imitation:
    """Maximise the likelihood of demonstrated actions (Pomerleau 1989, "ALVINN").

    With ``source: self`` this is rejection-sampling fine-tuning: the baseline that every claim
    of a cleverer method must beat at the same data volume. With ``conversations`` it is supervised
    fine-tuning. Every turn weighs the same, however long it is (``aggregation``).
    """

    Config = ImitationConfig

    def __init__(self, config: ImitationConfig, context: Context) -> None:
        self._config = config
        self._context = context
        file = config.trajectories
        self._given = stored(Path(file), context.agent) if file else []
        conversations = config.conversations
        self._conversations = read_conversations(Path(conversations)) if conversations else []

    @property
    def plan(self) -> Plan:
        config = self._config
        if config.source in ("file", "conversations"):
            return Plan(0, 0)
        player = "expert" if config.source == "expert" else "policy"
        return Plan(config.tasks_per_iteration, config.attempts_per_task, player=player)

    async def batches(self, judged: Sequence[Judged]) -> list[Batch]:
        examples = (*self._conversations, *self._shown(judged))
        return [Batch(self._config.nll, examples, self._config.epochs)] if examples else []

    def _shown(self, judged: Sequence[Judged]) -> list[Example]:
        return [
            example
            for group in by_task(self._given or judged)
            for one in group
            if score(one) >= self._config.threshold and one.trajectory.stop != Stop.FAILED
            for example in imitate(one.trajectory)
        ]
