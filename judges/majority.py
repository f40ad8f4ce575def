"""Agreement among attempts at one task, for when nobody knows the right answer."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..core.config import JudgeConfig
from ..core.protocols import HasAttempts
from ..core.types import Stop, Trajectory, Verdict


class MajorityJudge:
    """1 for attempts whose answer is the most common one, 0 for others (SRT, arXiv:2505.21444).

    The answer is the world's canonical form of the last action, or the action's own text where a
    world gives none. Attempts without a legal answer cast no vote and score 0; among equally
    common answers the earliest wins. Undecided, all of them, if no attempt has a legal answer,
    and about episodes that failed to run. Never looks at a reward.
    """

    Config = JudgeConfig

    def __init__(self, config: JudgeConfig, world: Any) -> None:
        self._world = world

    async def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        answers = [self._answer(t) for t in trajectories]
        votes = Counter(answer for answer in answers if answer is not None)
        if not votes:
            return [Verdict(None, "no attempt has a legal answer", "majority")] * len(answers)
        # Counter keeps the order of first appearance, and max the first of equals.
        winner, count = max(votes.items(), key=lambda item: item[1])
        words = f"{count} of {len(answers)} attempts answer {winner!r}"
        return [
            Verdict(None, t.error, "majority")
            if t.stop == Stop.FAILED
            else Verdict(float(answer == winner), words, "majority")
            for t, answer in zip(trajectories, answers, strict=True)
        ]

    def _answer(self, trajectory: Trajectory) -> str | None:
        if trajectory.stop == Stop.FAILED or not trajectory.steps:
            return None
        action = trajectory.steps[-1].action.text
        if isinstance(self._world, HasAttempts):
            return self._world.answer(trajectory.task, action)
        return action.strip() or None
