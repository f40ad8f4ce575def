"""Episodes that begin in the midst of others: from a snapshot as after a replay, only cheaper."""

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from components import SINGLE, played
from faulty_worlds import Faulty
from hypothesis import given
from hypothesis import strategies as st

from selfwright.core.config import Fleet
from selfwright.core.errors import RecipeError, WorldError
from selfwright.core.hosting.pool import open_worlds
from selfwright.core.hosting.snapshots import Snapshots
from selfwright.core.play.players import RandomPlayer
from selfwright.core.play.rollout import rollouts
from selfwright.core.protocols import Tasks
from selfwright.core.recipe import read
from selfwright.core.store import read_trajectories
from selfwright.core.types import Observation, Start, Task, TimeStep, Trajectory, WorldSpec
from selfwright.environments.countdown import Countdown
from selfwright.trainers.methods.group import GRPO

HERE = str(Path(__file__).parent)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setattr(sys, "path", [*sys.path, HERE])


class Replayed(Countdown):
    """It cannot be brought back to anything."""

    snapshot: ClassVar[Any] = None
    restore: ClassVar[Any] = None


class Apart(Countdown):
    """The same as Countdown, in processes of their own."""

    spec: ClassVar[WorldSpec] = replace(Countdown.spec, isolation="process", per_process=2)


def conversations(world: str) -> tuple[list[Trajectory], int]:
    """Four episodes, continued from every one of their turns; and the steps that worlds made."""

    async def run() -> list[Trajectory]:
        fleet = Fleet.model_validate({"parallel": 4})
        async with await open_worlds(world, {"attempts": 10}, fleet) as worlds:
            worlds.keep_snapshots()
            tasks = await worlds.tasks("train").take(range(4))
            every: list[Trajectory] = []
            begin = [Start(task, 7) for task in tasks]
            for turn in range(9):
                shorter = [replace(start, turns=1) for start in begin]
                played = await rollouts(RandomPlayer(), worlds, shorter, turn, origin=f"{turn}")
                every += played
                begin = [Start(t.task, 7, 0, t.steps, None, t.id) for t in played if not t.success]
            return every

    every = asyncio.run(run())
    return every, sum(t.executed for t in every)


def test_from_a_snapshot_all_goes_on_as_after_a_replay() -> None:
    replayed, dear = conversations("test_snapshots:Replayed")
    for world in ("countdown", "test_snapshots:Apart"):
        restored, cheap = conversations(world)
        assert [replace(t, task=None, restored=0) for t in restored] == [  # pyright: ignore
            replace(t, task=None, restored=0)
            for t in replayed  # pyright: ignore
        ]
        assert cheap == len(restored)  # One step each.
    assert dear > 4 * cheap


RISE = """{use: rise, tasks_per_iteration: 8, attempts_per_task: 2, samples: 2, turns: 10,
  tau: 0.5}"""


@pytest.mark.method
def test_rise_takes_few_steps_with_snapshots_and_learns_the_same(
    player: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    plain = "{use: grpo, tasks_per_iteration: 12, attempts_per_task: 4}"
    text = SINGLE.replace("MODEL", str(player)).replace(plain, RISE)
    recipe.write_text(text)
    told: dict[str, list[dict[str, Any]]] = {}
    stored: dict[str, Any] = {}
    for name in ("Countdown", "Replayed"):
        output = tmp_path / name
        wanted = [
            f"environment.use=test_snapshots:{name}",
            "environment.attempts=10",
            "iterations=2",
        ]
        played(recipe, wanted, output)
        rounds = sorted((output / "iterations").iterdir())
        told[name] = [json.loads((one / "metrics.json").read_text()) for one in rounds]
        stored[name] = [
            [replace(j.trajectory, restored=0, id="", parent="", policy="") for j in found]
            for found in map(read_trajectories, rounds)
        ]
    for cheap, dear in zip(told["Countdown"], told["Replayed"], strict=True):
        sampled = sum(len(t.steps) - t.replayed for t in stored["Countdown"][0])
        assert dear["rollout/environment_steps"] > 2 * sampled
        same = {k for k in cheap if not k.startswith("time/")} - {"rollout/environment_steps"}
        assert {k: cheap[k] for k in same} == {k: dear[k] for k in same}
    for cheap, rounds in zip(told["Countdown"], stored["Countdown"], strict=True):
        sampled = sum(len(t.steps) - t.replayed for t in rounds)
        assert cheap["rollout/environment_steps"] <= 1.5 * sampled
    assert stored["Countdown"] == stored["Replayed"]


class Mute(Faulty):
    """It says that nothing of it comes again."""

    spec: ClassVar[WorldSpec] = WorldSpec(isolation="inline", repeatable="no")


class Worded(Faulty):
    """Its words come again, its pictures and lists need not."""

    spec: ClassVar[WorldSpec] = WorldSpec(isolation="inline", repeatable="text")
    resets: ClassVar[int] = 0

    async def reset(self, task: Task, seed: int) -> Observation:
        Worded.resets += 1
        return replace(await super().reset(task, seed), actions=(f"right {Worded.resets}",))


class Moody(Worded):
    """It says that it repeats itself."""

    spec: ClassVar[WorldSpec] = replace(Worded.spec, repeatable="exact")


def test_a_trainer_that_replays_refuses_what_is_not_repeatable(
    player: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(SINGLE.replace("MODEL", str(player)))
    world = "environment={use: test_snapshots:Mute}"
    with pytest.raises(RecipeError, match=r"rise replays what was played, and .*Mute says"):
        read(recipe, [world, "trainer={use: rise}"])
    assert read(recipe, [world]).environment.use.endswith("Mute")


def test_a_replay_compares_what_a_world_says_that_it_repeats() -> None:
    async def run(name: str) -> list[Trajectory]:
        fleet = Fleet.model_validate({"parallel": 1, "max_failures": 1.0})
        async with await open_worlds(f"test_snapshots:{name}", {}, fleet) as worlds:
            task = await worlds.tasks("train").at(0)
            first = await rollouts(RandomPlayer(), worlds, [Start(task, 1, turns=1)], 0)
            again = [Start(task, 1, 0, first[0].steps, 1, first[0].id)]
            return await rollouts(RandomPlayer(), worlds, again, 0)

    (worded,), (moody,) = asyncio.run(run("Worded")), asyncio.run(run("Moody"))
    assert not worded.error and worded.replayed == 1 and len(worded.steps) == 2
    assert "did not repeat itself" in moody.error and "the actions" in moody.error


class Worn(Faulty):
    """A process of it plays three episodes."""

    spec: ClassVar[WorldSpec] = WorldSpec(per_process=2, recycle_after=3)


@pytest.mark.multi
def test_processes_are_replaced_after_so_many_episodes() -> None:
    async def run() -> None:
        fleet = Fleet.model_validate({"parallel": 1})
        seen: list[int] = []
        async with await open_worlds("test_snapshots:Worn", {}, fleet) as worlds:
            task = await worlds.tasks("train").at(0)
            for _ in range(8):
                async with worlds.lease() as world:
                    await world.reset(task, 0)
                    seen += worlds.processes
        assert [seen.count(pid) for pid in dict.fromkeys(seen)] == [3, 3, 2]

    asyncio.run(run())


actions = st.lists(st.sampled_from("ab"), max_size=4)


@given(st.lists(st.tuples(actions, st.booleans()), min_size=1, max_size=6), st.integers(0, 30))
def test_what_is_found_is_where_those_actions_led(
    episodes: list[tuple[list[str], bool]], most: int
) -> None:
    """A state is the actions that led there, so a wrong one is seen."""
    kept = Snapshots(most)
    begun: list[tuple[str, list[str]]] = []
    for number, (more, go_on) in enumerate(episodes):
        parent, before = begun[-1] if go_on and begun else ("", [])
        count, state = kept.find(parent, before)
        assert state == "".join(before[:count])
        kept.begin(f"e{number}", parent, before[:count])
        done = before[:count]
        for action in [*before[count:], *more]:
            done = [*done, action]
            kept.put(f"e{number}", action, "".join(done))
        begun.append((f"e{number}", done))
    assert kept.find("nobody", ["a"]) == (0, "")


class Curriculum(GRPO):
    """Begins with what it likes."""

    async def starts(self, tasks: Tasks, index: int, seed: int) -> Sequence[Start]:
        found = await tasks.take([3 + index, 5 + index])
        return [Start(task, seed, attempt, turns=2) for task in found for attempt in range(2)]


@pytest.mark.method
def test_a_trainer_may_say_itself_what_is_played(player: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(SINGLE.replace("MODEL", str(player)))
    wanted = ["trainer={use: test_snapshots:Curriculum}", "iterations=2"]
    played(recipe, wanted, tmp_path / "run")
    world = read(recipe).environment
    tasks = world.make().tasks("train")
    for index in range(2):
        stored = read_trajectories(tmp_path / "run" / "iterations" / f"{index:04d}")
        ids = [j.trajectory.task.id for j in stored]
        assert ids == [tasks[3 + index].id] * 2 + [tasks[5 + index].id] * 2


def test_an_answer_without_a_snapshot_is_no_state() -> None:
    assert TimeStep(Observation("x"), 0.0, False).answer is None
    with pytest.raises(WorldError, match="no method 'restore'"):

        async def run() -> None:
            fleet = Fleet.model_validate({"parallel": 1})
            async with await open_worlds("faulty_worlds:Faulty", {}, fleet) as worlds:
                assert not worlds.abilities & {"snapshot", "restore"}
                worlds.keep_snapshots()
                assert worlds.snapshots is None
                async with worlds.lease() as world:
                    await world.restore(await worlds.tasks("train").at(0), "x")

        asyncio.run(run())
