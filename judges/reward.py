"""The world's own reward as the score."""

from collections.abc import Sequence
from typing import Any

from ..core.config import JudgeConfig
from ..core.types import Stop, Trajectory, Verdict


class RewardJudge:
    """An episode's reward, clipped to [0, 1]. Undecided about episodes that failed to run."""

    Config = JudgeConfig

    def __init__(self, config: JudgeConfig, world: Any) -> None:
        pass

    async def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        return [
            Verdict(None, t.error, "reward")
            if t.stop == Stop.FAILED
            else Verdict(min(max(t.reward, 0.0), 1.0), t.final.text, "reward")
            for t in trajectories
        ]
