"""Learning from a judge instead of the world's reward, and noticing when that goes wrong."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from ...core.files import read_json, write_json
from ...core.protocols import Context
from ...core.seeds import derive
from ...core.types import Batch, Judged, Metrics
from ..parts.credit import by_task, score
from ..parts.group_relative import GroupConfig, GroupRelative
from ..parts.guards import Guard, GuardConfig, set_apart
from ..parts.practice import practised


class SelfJudgeConfig(GroupConfig):
    vote_share: float = Field(default=0.0, ge=0, le=1)
    """Groups whose mean score is lower have no label worth learning. With ``judge: majority`` that
    mean is the share of votes for the winner."""
    easiest: float = Field(default=1.0, gt=0, le=1)
    """Learn only from that share of the groups, those with the highest mean scores."""
    practice: int = Field(default=0, ge=0)
    """So many tasks an iteration the policy is asked to write itself, like the world's own; those
    that are training tasks of the world are played and learned beside them."""
    guards: GuardConfig = GuardConfig()


class SelfJudge(GroupRelative):
    """Group-relative learning of what the recipe's judge pays, under guard.

    Which method it is, the judge decides. ``model``, asked of the policy or its frozen base, about
    the extracted answer: RLSR (Simonds et al. 2025, arXiv:2505.08827). ``majority`` with
    ``baseline: rloo``, ``kl_in: reward``: SRT (Shafayat et al. 2025, arXiv:2505.21444), with its
    threshold (``vote_share``) and its easiest-share curriculum. ``pairwise`` with ``baseline:
    dr_grpo``: SPO (Swamy et al. 2024, arXiv:2401.04056).

    With ``practice`` the policy also writes tasks for itself, as in RLSR.

    Departures: RLSR's reward is a yes or no; ``judge.cut: 0.5`` makes the model's probability one.
    Its policy writes easier tasks and then harder ones, of any kind; here a little easier ones
    only, that are training tasks of the world. SRT's KL is 0.001 in the reward, here 0 unless the
    recipe says so, as the shipped ones do; its token losses are averaged over the batch, here over
    each turn first (``aggregation``); it may pay the share of equal votes, here 0 or 1. What is
    below ``vote_share`` is left out of the batch, not learned with a reward of 0.
    Guards are on. A share of every iteration's tasks is judged, compared with the world's word and
    not learned from; the run ends once the judge pays for what is no answer, is mostly wrong, or
    rises while the truth falls, and goes back to what had been learned when the truth was best.
    (The last two reasons say nothing of a judge that only compares, and are not looked at then.)
    """

    Config = SelfJudgeConfig

    def __init__(self, config: SelfJudgeConfig, context: Context) -> None:
        super().__init__(config, context)
        self._own = config
        self._guard = Guard(config.guards)
        self._step = 0
        self._practised: Metrics = {}

    async def batches(self, judged: Sequence[Judged]) -> list[Batch]:
        config, groups = self._own, by_task(judged)
        if config.guards.on:
            seed = derive(self._context.seed, "labelled", self._step)
            labelled, groups = set_apart(groups, config.guards.labelled, seed)
            await self._guard.look(labelled, self._context.judge, self._step)
        known = [group[0].trajectory.task for group in groups]
        shape = (config.attempts_per_task, config.turns)
        seed = derive(self._context.seed, "practice", self._step)
        more, findings = await practised(self._context, known, config.practice, *shape, seed)
        self._practised = findings
        groups += by_task(more)
        self._step += 1
        groups = chosen(groups, config.vote_share, config.easiest)
        return self.learned(groups, await self.rewards(groups))

    @property
    def findings(self) -> Metrics:
        return self._guard.findings | self._practised

    @property
    def alarm(self) -> str:
        return self._guard.alarm

    @property
    def trusted(self) -> int:
        return self._guard.trusted

    def save(self, folder: Path, images: Path) -> None:
        write_json(folder / "self_judge.json", {"step": self._step} | self._guard.state())

    def restore(self, folder: Path) -> None:
        state = read_json(folder / "self_judge.json")
        self._step = state["step"]
        self._guard.load(state)


def chosen(groups: Sequence[list[Judged]], vote_share: float, easiest: float) -> list[list[Judged]]:
    """Groups with a mean score of ``vote_share`` or more; of those the ``easiest`` share of all."""
    mean_scores = [statistics.fmean(map(score, group)) for group in groups]
    ranked = sorted(range(len(groups)), key=lambda k: -mean_scores[k])
    kept = set(ranked[: math.ceil(easiest * len(groups))])
    return [g for k, g in enumerate(groups) if k in kept and mean_scores[k] >= vote_share]
