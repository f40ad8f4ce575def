"""Judges: one verdict a trajectory, in order; undecided is not 0."""

import asyncio

from selfwright.core.config import JudgeConfig
from selfwright.core.types import (
    Action,
    Completion,
    Observation,
    Step,
    Stop,
    Task,
    Trajectory,
    Verdict,
)
from selfwright.environments.countdown import Countdown, CountdownConfig
from selfwright.judges.majority import MajorityJudge
from selfwright.judges.reward import RewardJudge

WORLD = Countdown(CountdownConfig())
TASK = WORLD.tasks("train")[0]
PLAIN = Task("t", "do it", 3)


def trajectory(
    task: Task, said: list[tuple[str, float]], stop: Stop = Stop.TERMINATED
) -> Trajectory:
    steps = tuple(
        Step(Observation("o"), Action(text, Completion(text)), reward) for text, reward in said
    )
    error = "WorldError: gone" if stop == Stop.FAILED else ""
    return Trajectory(task, steps, Observation("end"), stop, "base", 0, error=error)


def test_reward_sums_and_clips_and_leaves_failures_undecided() -> None:
    judge = RewardJudge(JudgeConfig(), object())
    played = [
        trajectory(PLAIN, [("a", 0.25), ("b", 0.5)]),
        trajectory(PLAIN, [("a", 3.0)]),
        trajectory(PLAIN, [("a", -1.0)]),
        trajectory(PLAIN, [("a", 1.0)], Stop.FAILED),
        trajectory(PLAIN, []),
    ]
    scores = [v.score for v in asyncio.run(judge.judge(played))]
    assert scores == [0.75, 1.0, 0.0, None, 0.0]


def test_in_a_world_of_attempts_the_last_one_counts() -> None:
    judge = RewardJudge(JudgeConfig(), WORLD)
    played = [
        trajectory(TASK, [("a", 1.0), ("b", 0.0)]),
        trajectory(TASK, [("a", 0.0), ("b", 1.0)]),
    ]
    assert [v.score for v in asyncio.run(judge.judge(played))] == [0.0, 1.0]


def vote(*actions: str | None) -> list[float | None]:
    judge = MajorityJudge(JudgeConfig(), WORLD)
    played = [
        trajectory(TASK, [("1", 0.0)], Stop.FAILED)
        if action is None
        else trajectory(TASK, [(action, 0.0)])
        for action in actions
    ]
    verdicts: list[Verdict] = asyncio.run(judge.judge(played))
    return [verdict.score for verdict in verdicts]


def test_majority_counts_values_not_spellings_and_never_the_illegal() -> None:
    a, b, c = TASK.numbers
    plus, swapped, times = f"{a}+{b}+{c}", f"{c}+{b}+{a}", f"{a}*{b}*{c}"
    assert vote(times, plus, swapped, "junk", "junk", "junk") == [0.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert vote(times, plus) == [1.0, 0.0], "of equals the earliest"
    assert vote("junk", "junk") == [None, None]
    assert vote(None, plus, plus) == [None, 1.0, 1.0]
    assert vote(plus) == [None], "one is no majority"


def test_majority_moves_with_the_attempts() -> None:
    a, b, c = TASK.numbers
    actions = [f"{a}+{b}+{c}", f"{a}*{b}*{c}", f"{a}+{c}+{b}"]
    assert vote(*actions) == [1.0, 0.0, 1.0]
    assert vote(*reversed(actions)) == [1.0, 0.0, 1.0]
    assert vote(actions[1], actions[0], actions[2]) == [0.0, 1.0, 1.0]


def test_majority_in_other_worlds_compares_the_last_action() -> None:
    judge = MajorityJudge(JudgeConfig(), object())
    played = [trajectory(PLAIN, [(text, 0.0)]) for text in ("left", "right ", "right")]
    assert [v.score for v in asyncio.run(judge.judge(played))] == [0.0, 1.0, 1.0]
