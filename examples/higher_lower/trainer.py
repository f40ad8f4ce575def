"""Imitate the best attempt of each group, the more the further it is above the others."""

from collections import defaultdict
from collections.abc import Sequence

from pydantic import Field

from selfwright.core.config import Config
from selfwright.core.protocols import Context, Plan
from selfwright.core.types import Batch, Example, Judged
from selfwright.trainers.learning.examples import imitate
from selfwright.trainers.learning.loss import NLL


class BestOfGroupConfig(Config):
    tasks_per_iteration: int = Field(default=16, ge=1)
    attempts_per_task: int = Field(default=4, ge=2)
    epochs: int = Field(default=1, ge=1)


class BestOfGroup:
    """A group whose attempts all scored the same teaches nothing."""

    Config = BestOfGroupConfig

    def __init__(self, config: BestOfGroupConfig, context: Context) -> None:
        self._config = config
        self._margins: list[float] = []

    @property
    def plan(self) -> Plan:
        return Plan(self._config.tasks_per_iteration, self._config.attempts_per_task)

    async def batches(self, judged: Sequence[Judged]) -> list[Batch]:
        groups: defaultdict[str, list[tuple[float, Judged]]] = defaultdict(list)
        for one in judged:
            if one.verdict.score is not None:
                groups[one.trajectory.task.id].append((one.verdict.score, one))
        examples: list[Example] = []
        self._margins = []
        for group in groups.values():
            mean = sum(score for score, _ in group) / len(group)
            best, one = max(group, key=lambda pair: pair[0])
            if best > mean:
                self._margins.append(best - mean)
                examples += imitate(one.trajectory, weight=best - mean)
        return [Batch(NLL(), tuple(examples), self._config.epochs)] if examples else []

    @property
    def findings(self) -> dict[str, float]:
        if not self._margins:
            return {}
        return {"best_of_group/margin": sum(self._margins) / len(self._margins)}
