"""Many groups judged at once: what a judge does wrong is counted, and never a 0."""

import asyncio
from collections.abc import Sequence

import pytest

from selfwright.core.config import JudgeConfig
from selfwright.core.errors import JudgeError
from selfwright.core.play.judging import BROKEN, judged
from selfwright.core.types import Observation, Stop, Task, Trajectory, Verdict


def attempts(*tasks: str, each: int = 2) -> list[Trajectory]:
    """Unplayed; the task's id tells the judge below what to do."""
    return [
        Trajectory(Task(task, "", 1), (), Observation(""), Stop.TRUNCATED, "base", 0, attempt)
        for task in tasks
        for attempt in range(each)
    ]


class Moody:
    def __init__(self) -> None:
        self.at_once = 0
        self.most = 0

    async def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        assert len({t.task.id for t in trajectories}) == 1
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            await asyncio.sleep(0)
            return await self.verdicts(trajectories[0].task.id, len(trajectories))
        finally:
            self.at_once -= 1

    async def verdicts(self, mood: str, count: int) -> list[Verdict]:
        match mood:
            case "raise":
                raise KeyError("no such rubric")
            case "hang":
                await asyncio.sleep(3600)
            case "short":
                return [Verdict(1.0, "", "moody")] * (count - 1)
            case "high":
                return [Verdict(1.5, "", "moody")] * count
            case "unsure":
                return [Verdict(None, "who knows", "moody")] * count
            case _:
                pass
        return [Verdict(k / 4, mood, "moody") for k in range(count)]


def verdicts(*tasks: str, **settings: float) -> list[Verdict]:
    config = JudgeConfig.model_validate({"timeout_s": 0.3, "max_failures": 0.9, **settings})
    trajectories = attempts(*tasks)
    given = asyncio.run(judged(Moody(), trajectories, config))
    assert [one.trajectory for one in given] == trajectories
    return [one.verdict for one in given]


def test_verdicts_come_back_in_order() -> None:
    assert [(v.score, v.feedback) for v in verdicts("a", "b")] == [
        (0.0, "a"),
        (0.25, "a"),
        (0.0, "b"),
        (0.25, "b"),
    ]
    assert asyncio.run(judged(Moody(), [], JudgeConfig())) == []


@pytest.mark.parametrize(
    ("mood", "said"),
    [
        ("raise", "KeyError: 'no such rubric'"),
        ("hang", "TimeoutError: the judge took longer than 0.3 s"),
        ("short", "ValueError: 1 verdicts for 2 trajectories"),
        ("high", "ValueError: a score of 1.5; wanted one in [0, 1], or None if undecided"),
    ],
)
def test_what_a_judge_failed_to_decide_is_undecided(mood: str, said: str) -> None:
    first, second, third, _ = verdicts(mood, "fine")
    assert (first.score, first.judge, first.feedback) == (None, BROKEN, said)
    assert second == first and third.score == 0.0


def test_undecided_is_not_broken() -> None:
    assert [v.judge for v in verdicts("unsure", max_failures=0.0)] == ["moody"] * 2


def test_too_many_failures_stop_it_with_the_first_traceback() -> None:
    with pytest.raises(
        JudgeError, match=r"2 of 4 groups .* judged, more than judge.max_failures=0.25"
    ) as caught:
        verdicts("raise", "fine", "raise", "fine", max_failures=0.25)
    assert "Traceback" in str(caught.value) and "no such rubric" in str(caught.value)


def test_no_more_are_judged_at_once_than_asked() -> None:
    judge = Moody()
    config = JudgeConfig(parallel=3)
    asyncio.run(judged(judge, attempts(*map(str, range(20))), config))
    assert judge.most == 3
