"""Agreement among attempts at one task, for when nobody knows the right answer."""

from collections.abc import Sequence

from ..core.config import JudgeConfig
from ..core.statistics import majority
from ..core.types import Stop, Trajectory, Verdict


class MajorityJudge:
    """1 for attempts whose answer is the most common one, 0 for others (SRT, arXiv:2505.21444).

    The answer is the world's canonical form of the last action, or the action's own text where a
    world gives none. Attempts without a legal answer cast no vote and score 0; among equally
    common answers the earliest wins. Undecided, all of them, if no attempt has a legal answer or
    there is only one, and about episodes that failed to run. Never looks at a reward.
    """

    Config = JudgeConfig

    def __init__(self, config: JudgeConfig) -> None:
        pass

    async def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        if len(trajectories) == 1:
            return [
                Verdict(None, trajectories[0].error or "one attempt is no majority", "majority")
            ]
        answers = [self._answer(t) for t in trajectories]
        winner = majority(answers)
        if winner is None:
            return [Verdict(None, "no attempt has a legal answer", "majority")] * len(answers)
        words = f"{answers.count(winner)} of {len(answers)} attempts answer {winner!r}"
        return [
            Verdict(None, t.error, "majority")
            if t.stop == Stop.FAILED
            else Verdict(float(answer == winner), words, "majority")
            for t, answer in zip(trajectories, answers, strict=True)
        ]

    def _answer(self, trajectory: Trajectory) -> str | None:
        if trajectory.stop == Stop.FAILED or not trajectory.steps:
            return None
        last = trajectory.steps[-1]
        return (last.action.text.strip() if last.answer is None else last.answer) or None
