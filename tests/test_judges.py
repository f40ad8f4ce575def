"""Judges: one verdict a trajectory, in order; undecided is not 0."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from components import AGENT

from selfwright.agents.engines.transformers import TransformersConfig, TransformersPolicy
from selfwright.core.config import Fleet, JudgeConfig
from selfwright.core.hosting.pool import open_worlds
from selfwright.core.play.draw import draw, starts
from selfwright.core.play.judging import judged
from selfwright.core.play.players import RandomPlayer
from selfwright.core.play.rollout import rollouts
from selfwright.core.plugins import load
from selfwright.core.protocols import AsksPolicies, Judge, Policy
from selfwright.core.store import (
    judge_identity,
    read_trajectories,
    write_trajectories,
    write_verdicts,
)
from selfwright.core.types import (
    Action,
    Completion,
    Judged,
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
    """As it is stored: with the answers that the world read in it, where it has such."""
    steps = tuple(
        Step(
            Observation("o"),
            Action(text, Completion(text)),
            reward,
            None if task is PLAIN else WORLD.answer(TASK, text) or "",
        )
        for text, reward in said
    )
    error = "WorldError: gone" if stop == Stop.FAILED else ""
    return Trajectory(task, steps, Observation("end"), stop, "base", 0, error=error)


def test_reward_sums_and_clips_and_leaves_failures_undecided() -> None:
    judge = RewardJudge(JudgeConfig())
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
    judge = RewardJudge(JudgeConfig())
    played = [
        trajectory(TASK, [("a", 1.0), ("b", 0.0)]),
        trajectory(TASK, [("a", 0.0), ("b", 1.0)]),
    ]
    assert [v.score for v in asyncio.run(judge.judge(played))] == [0.0, 1.0]


def test_an_attempt_that_is_no_legal_one_is_the_last_all_the_same() -> None:
    """The last one's pay counts, also where nothing could be read in it."""
    one = trajectory(TASK, [("a", 1.0)])
    mute = Action("", Completion("hm"), invalid="Say a sum.")
    steps = (*one.steps, Step(Observation("o"), mute, 0.0, ""))
    judge = RewardJudge(JudgeConfig())
    assert [v.score for v in asyncio.run(judge.judge([replace(one, steps=steps)]))] == [0.0]


def test_stored_episodes_are_judged_without_their_world(tmp_path: Path) -> None:
    a, b, c = TASK.numbers
    said = [f"{a}+{b}+{c}", f"{a}*{b}*{c}", f"{c} + {a} + {b}", "junk"]
    played = [
        replace(trajectory(TASK, [("0", 1.0), (text, float(k == 1))]), attempt=k)
        for k, text in enumerate(said)
    ]
    unjudged = Verdict(None, "", "")
    write_trajectories(tmp_path, [Judged(one, unjudged) for one in played], tmp_path / "images")
    stored = [one.trajectory for one in read_trajectories(tmp_path)]
    for judge in (MajorityJudge(JudgeConfig()), RewardJudge(JudgeConfig())):
        assert asyncio.run(judge.judge(stored)) == asyncio.run(judge.judge(played))
    verdicts = asyncio.run(MajorityJudge(JudgeConfig()).judge(stored))
    assert [verdict.score for verdict in verdicts] == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("majority", {}),
        ("model", {}),
        ("model", {"shows": "transcript", "answer": "points", "max_tokens": 6}),
        ("pairwise", {}),
    ],
)
def test_from_disk_a_judge_says_what_it_said_live(
    model_folder: Callable[[str], Path], tmp_path: Path, kind: str, keys: dict[str, Any]
) -> None:
    """Whichever judge: it sees what was kept, and no world."""
    plugin = load("judges", kind)
    config = plugin.Config.model_validate(keys)

    def judge_with(policy: Policy) -> Judge:
        judge: Any = plugin(config)
        if isinstance(judge, AsksPolicies):

            async def open(name: str) -> Policy:
                assert name == "base"
                return policy

            judge.ask_through(open)
        return cast(Judge, judge)

    async def live() -> list[Judged]:
        policy = opened(model_folder("scratch"))
        async with await open_worlds("countdown", {"attempts": 3}, Fleet()) as worlds:
            begin = starts(await draw(worlds.tasks("train"), 3, 1), 4, 1)
            played = await rollouts(RandomPlayer(AGENT), worlds, begin, 5)
        try:
            return await judged(judge_with(policy), played, config)
        finally:
            await policy.close()

    async def later() -> list[Judged]:
        policy = opened(model_folder("scratch"))
        stored = [one.trajectory for one in read_trajectories(tmp_path)]
        try:
            return await judged(judge_with(policy), stored, config)
        finally:
            await policy.close()

    given = asyncio.run(live())
    unjudged = [replace(one, verdict=Verdict(None, "", "")) for one in given]
    write_trajectories(tmp_path, unjudged, tmp_path / "images")
    again = asyncio.run(later())
    assert [one.verdict for one in again] == [one.verdict for one in given]
    scores = {one.verdict.score for one in given}
    assert len(scores) > 1 or "points" in keys.values()
    # And it is kept beside what was said first.
    identity = judge_identity(kind, config.model_dump(mode="json"))
    write_verdicts(tmp_path, identity, {one.trajectory.id: one.verdict for one in again})
    assert [j.verdict for j in read_trajectories(tmp_path, identity.hash)] == [
        j.verdict for j in given
    ]


def opened(folder: Path) -> TransformersPolicy:
    config = TransformersConfig.model_validate({"model": str(folder)})
    return TransformersPolicy(config, str(folder), 0)


def vote(*actions: str | None) -> list[float | None]:
    judge = MajorityJudge(JudgeConfig())
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
    judge = MajorityJudge(JudgeConfig())
    played = [trajectory(PLAIN, [(text, 0.0)]) for text in ("left", "right ", "right")]
    assert [v.score for v in asyncio.run(judge.judge(played))] == [0.0, 1.0, 1.0]
