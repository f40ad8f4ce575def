"""Self-rewarding: of one's own attempts the best-liked one is preferred to the least-liked."""

from collections.abc import Sequence
from dataclasses import replace

from pydantic import Field

from ...core.protocols import Context, Plan
from ...core.types import Aggregation, Batch, Example, Judged
from ..learning.examples import reinforce
from ..learning.loss import DPO
from ..parts.advantage import own_turns
from ..parts.credit import TrainerConfig, by_task, score


class SelfRewardingConfig(TrainerConfig):
    attempts_per_task: int = Field(default=4, ge=2)
    aggregation: Aggregation = "seq-mean-token-sum"
    beta: float = Field(default=0.1, gt=0)
    """DPO's: how dear it is to leave the policy that sampled."""


class SelfRewarding:
    """Self-Rewarding language models (Yuan et al. 2024, arXiv:2401.10020).

    Of each task's attempts the one with the highest and the one with the lowest score become a
    pair, unless the two are equal; DPO learns the pairs, from the policy that sampled on. The
    paper's judge is ``use: model, model: policy, rubric: additive, answer: points, samples: 3``;
    its seed of instructions and of evaluations (M0 to M1) a phase of ``imitation`` of
    ``conversations`` before this one.

    Departures: the judge is the recipe's, which by default is the world's reward; tasks are the
    world's, not self-made; the turns of an episode are all of one side; from round to round the
    optimiser goes on, at the learner's rate; a token loss has DPO's gradient, not its value.
    """

    Config = SelfRewardingConfig

    def __init__(self, config: SelfRewardingConfig, context: Context) -> None:
        self._config = config
        self._context = context

    @property
    def plan(self) -> Plan:
        return Plan(self._config.tasks_per_iteration, self._config.attempts_per_task)

    async def batches(self, judged: Sequence[Judged]) -> list[Batch]:
        config = self._config
        examples: list[Example] = []
        for number, group in enumerate(by_task(judged)):
            best, worst = max(group, key=score), min(group, key=score)
            if score(best) > score(worst):
                pair = self._side(best, 1.0) + self._side(worst, -1.0)
                examples += [replace(one, group=number) for one in pair]
        loss = DPO(config.beta, config.aggregation, config.length)
        return [Batch(loss, tuple(examples), config.epochs)] if examples else []

    def _side(self, one: Judged, sign: float) -> list[Example]:
        return reinforce(one.trajectory, [sign] * len(own_turns(one)))
