"""The sooner it succeeded, the better."""

from collections.abc import Sequence

from selfwright.core.config import JudgeConfig
from selfwright.core.types import Stop, Trajectory, Verdict


class Brief:
    """1 for success at once, less with every further step, 0 for none."""

    Config = JudgeConfig

    def __init__(self, config: JudgeConfig) -> None:
        pass

    async def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        return [self._verdict(one) for one in trajectories]

    def _verdict(self, one: Trajectory) -> Verdict:
        if one.stop == Stop.FAILED:
            return Verdict(None, one.error, "brief")
        left = one.task.max_steps - len(one.steps) + 1
        score = left / one.task.max_steps if one.success else 0.0
        return Verdict(score, f"{len(one.steps)} steps of {one.task.max_steps}", "brief")
