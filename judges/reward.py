"""The world's own reward as the score."""

from collections.abc import Sequence

from ..core.config import JudgeConfig
from ..core.types import Stop, Trajectory, Verdict


class RewardJudge:
    """An episode's reward, clipped to [0, 1]. Undecided about episodes that failed to run.

    In a world of attempts it is the last attempt's: what an episode that never ends by success
    has come to.
    """

    Config = JudgeConfig

    def __init__(self, config: JudgeConfig) -> None:
        pass

    async def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        return [
            Verdict(None, t.error, "reward")
            if t.stop == Stop.FAILED
            else Verdict(min(max(self._paid(t), 0.0), 1.0), t.final.text, "reward")
            for t in trajectories
        ]

    def _paid(self, trajectory: Trajectory) -> float:
        if trajectory.steps and trajectory.steps[-1].answer is not None:
            return trajectory.steps[-1].reward
        return trajectory.reward
