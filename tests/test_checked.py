"""What worlds, policies and judges give is looked at where it comes in; what is wrong is named."""

import asyncio
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from components import context_of, episode
from faulty_worlds import HALF
from hypothesis import given
from hypothesis import strategies as st

from selfwright.agents.chat import Chat, ChatConfig
from selfwright.core import evaluation
from selfwright.core.checked import (
    UnreadableTask,
    checked_answer,
    checked_observation,
    checked_task,
    checked_time_step,
)
from selfwright.core.config import Fleet, JudgeConfig
from selfwright.core.errors import TooManyFailures, WorldError
from selfwright.core.hosting.inline import InlineHost
from selfwright.core.hosting.pool import Split, open_worlds
from selfwright.core.play.asking import ask, with_deadline
from selfwright.core.play.judging import BROKEN, judged
from selfwright.core.play.players import ExpertPlayer, Player, PolicyPlayer, RandomPlayer
from selfwright.core.play.rollout import rollouts
from selfwright.core.recipe import section
from selfwright.core.store import read_trajectories, write_trajectories
from selfwright.core.types import (
    Completion,
    Judged,
    Message,
    Observation,
    Prompt,
    Sampling,
    Start,
    Stop,
    Task,
    TimeStep,
    Trajectory,
    Verdict,
    WorldSpec,
)
from selfwright.core.unicode import no_unicode
from selfwright.loop.components import namer
from selfwright.loop.evaluate import EvalSpec, introspect, task_result

halves = st.integers(0xD800, 0xDFFF).map(chr)


@pytest.fixture(autouse=True)
def _fixtures_importable(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])


@given(st.text(max_size=8), halves, st.text(max_size=8))
def test_half_of_a_pair_anywhere_is_found_and_nothing_else(a: str, half: str, b: str) -> None:
    assert no_unicode(a) == ""
    assert no_unicode(a + half + b).startswith(f"U+{ord(half):04X} at character {len(a)} ")
    right = Observation(a, (), (a, b))
    assert checked_observation(right, "w") is right
    for wrong, where in (
        (replace(right, text=a + half + b), "Observation.text"),
        (replace(right, actions=(a, b + half)), r"Observation.actions\[1\]"),
    ):
        with pytest.raises(WorldError, match=f"w: {where} is no Unicode: U\\+"):
            checked_time_step(TimeStep(wrong, 0.0, False), "w")
    with pytest.raises(WorldError, match=r"w\.answer\(\) is no Unicode"):
        checked_answer(half + a, "w")
    task = checked_task(Task(f"{a}1{half}", "do", 3), "w: train[0]")
    assert isinstance(task, UnreadableTask)
    assert no_unicode(task.id) == "" and task.fault.startswith("w: train[0].id is no Unicode: U+")


def test_a_task_is_a_task() -> None:
    right = Task("one", "Do it.", 3)
    assert checked_task(right, "here") is right
    assert checked_task(replace(right, max_steps=2**31 - 1), "here").max_steps == 2**31 - 1
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"id": 7}, "here.id is 7; wanted a text"),
        ({"id": ""}, "here.id is ''; wanted a text"),
        ({"instruction": None}, "here.instruction is None; wanted a text"),
        ({"max_steps": 0}, "here.max_steps is 0; wanted an int of at least 1"),
        ({"max_steps": True}, "max_steps is True"),
        ({"max_steps": 2.0}, "max_steps is 2.0"),
        ({"max_steps": 2**31}, "max_steps is 2147483648"),
    ]
    for fields, said in wrong:
        with pytest.raises(WorldError, match=said):
            checked_task(replace(right, **fields), "here")
    with pytest.raises(WorldError, match=r"here is tuple .*; wanted a Task"):
        checked_task(("one", "Do it.", 3), "here")


class Splits:
    """One split is sound, one holds what is no task, one is no sequence."""

    spec = WorldSpec(isolation="inline")

    def tasks(self, split: str) -> Any:
        three = [Task(f"t{k}", "Do it.", 3) for k in range(3)]
        return {"train": three, "validation": [*three, "t3"]}.get(split)

    async def close(self) -> None:
        pass


def test_every_task_is_looked_at_when_it_is_asked_for() -> None:
    async def run() -> None:
        host = InlineHost("w", Splits, Splits, Splits.spec)
        await host.open()
        sound, spoilt, none = (Split(host, "w", s) for s in ("train", "validation", "test"))
        assert [task.id for task in await sound.take([2, 0])] == ["t2", "t0"]
        assert (await spoilt.at(2)).id == "t2"
        with pytest.raises(WorldError, match=r"w: validation\[3\] is str 't3'; wanted a Task"):
            await spoilt.at(3)
        with pytest.raises(WorldError, match="w: test is NoneType None; wanted a sequence"):
            await none.size()
        await host.close()

    asyncio.run(run())


def played(kind: str, fault: str, player: Player) -> list[Trajectory]:
    async def run() -> list[Trajectory]:
        fleet = Fleet.model_validate({"parallel": 2, "max_failures": 1.0})
        async with await open_worlds(f"faulty_worlds:{kind}", {"fault": fault}, fleet) as worlds:
            begin = [Start(task, 2**62) for task in await worlds.tasks("train").take(range(2))]
            return await rollouts(player, worlds, begin, 0)

    return asyncio.run(run())


@pytest.mark.parametrize("kind", ["Faulty", "Together"])
@pytest.mark.parametrize(
    ("fault", "player", "said"),
    [
        ("half reset", ExpertPlayer(), "Observation.text is no Unicode: U+D83D"),
        ("half list", RandomPlayer(), "Observation.actions[1] is no Unicode: U+D83D"),
        ("half step", ExpertPlayer(), "Observation.text is no Unicode: U+D83D"),
        ("half expert", ExpertPlayer(), ".expert() is no Unicode: U+D83D"),
        ("half random", RandomPlayer(), ".random() is no Unicode: U+D83D"),
        ("half id", ExpertPlayer(), "train[0].id is no Unicode: U+D83D"),
        ("half instruction", ExpertPlayer(), "train[0].instruction is no Unicode: U+D83D"),
        ("always half words", ExpertPlayer(), r"half of it: \ud83d"),
    ],
)
def test_what_a_world_gives_that_is_no_text_fails_its_episode_which_is_kept(
    tmp_path: Path, kind: str, fault: str, player: Player, said: str
) -> None:
    trajectories = played(kind, fault, player)
    assert [t.stop for t in trajectories] == [Stop.FAILED] * 2
    name = "ValueError" if "words" in fault else "WorldError"
    assert trajectories[0].error.startswith(f"{name}: ")
    assert said in trajectories[0].error
    kept = [Judged(t, Verdict(None, t.error, "reward")) for t in trajectories]
    write_trajectories(tmp_path, kept, tmp_path / "images")
    assert len(read_trajectories(tmp_path)) == 2
    results = [task_result(one) for one in kept]
    assert evaluation.summarise(results)["failed"] == 2


@pytest.mark.parametrize("kind", ["Faulty", "Apart"])
def test_ids_that_are_numbers_are_refused_before_anything_is_played(kind: str) -> None:
    with pytest.raises(WorldError, match=r"faulty_worlds:\w+: train\[0\].id is 0; wanted a text"):
        played(kind, "numbers", ExpertPlayer())


def test_a_table_does_without_answers_that_are_no_text() -> None:
    async def run(allowed: float) -> float:
        environment, fleet = section(
            "environment",
            "faulty_worlds:Sum",
            ["environment.fault='half answer'", f"environment.max_failures={allowed}"],
        )
        agent, judge = section("agent", "chat")[0], section("judge", "reward")[0]
        spec = EvalSpec(environment, agent, fleet, "test", 20, 5, 0.0, 2, judge)
        settings = environment.config.model_dump(mode="json")
        async with await open_worlds(environment.use, settings, fleet) as worlds:
            tasks = await worlds.tasks("test").take(range(20))
            table, _ = await introspect(spec, RandomPlayer(), worlds, tasks)
        return table.m1_t1.rate

    assert asyncio.run(run(1.0)) == 0.0
    with pytest.raises(TooManyFailures, match=r"episodes failed.*max_failures=0.01"):
        asyncio.run(run(0.01))


class Says:
    """A policy that says one thing."""

    checkpoint = "says"

    def __init__(self, completion: Completion) -> None:
        self._completion = completion

    def batch_slot(self) -> Any:
        return nullcontext()

    async def complete(self, prompt: Prompt, sampling: Sampling, seed: int) -> Completion:
        return self._completion


@pytest.mark.parametrize(
    ("completion", "said"),
    [
        (Completion(f"right{HALF}"), "says: its completion is no Unicode: U+D83D at character 5"),
        (Completion(cast(str, None)), "says: its completion is NoneType None; wanted a str"),
        (Completion("right", (1,), (float("nan"),)), "says: a log-probability is NaN"),
    ],
)
def test_what_a_policy_says_that_is_no_text_fails_its_episode_or_question(
    completion: Completion, said: str
) -> None:
    policy: Any = Says(completion)
    player = PolicyPlayer(Chat(ChatConfig.model_validate({})), policy, Sampling())
    errors = [trajectory.error for trajectory in played("Faulty", "", player)]
    assert all(error.startswith(f"PolicyError: {said}") for error in errors) and len(errors) == 2
    prompts = [Prompt((Message("user", ("?",)),))] * 2
    answers = asyncio.run(ask(with_deadline(policy, 9.0), prompts, Sampling(), 0, max_failures=1.0))
    assert answers == [None, None]


class Writes:
    """A judge whose words are no text."""

    async def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        if trajectories[0].task.id == "raises":
            raise ValueError(HALF)
        return [Verdict(1.0, HALF, "writes")] * len(trajectories)


def test_what_a_judge_writes_that_is_no_text_is_undecided(tmp_path: Path) -> None:
    given = [episode(1.0, ("o", "x"), task=name).trajectory for name in ("raises", "writes")]
    config = JudgeConfig.model_validate({"max_failures": 1.0})
    kept = asyncio.run(judged(Writes(), given, config))
    assert [(one.verdict.score, one.verdict.judge) for one in kept] == [(None, BROKEN)] * 2
    assert "Verdict.feedback is no Unicode" in kept[1].verdict.feedback
    write_trajectories(tmp_path, kept, tmp_path / "images")


def test_a_name_that_stands_for_two_tasks_is_looked_up_in_vain() -> None:
    async def run() -> None:
        fleet = Fleet.model_validate({})
        settings = {"fault": "namesakes"}
        async with await open_worlds("faulty_worlds:Faulty", settings, fleet) as worlds:
            context = context_of(named=namer(worlds))
            await context.named("train 0")

    with pytest.raises(WorldError, match="two tasks are called 'train 0'"):
        asyncio.run(run())
