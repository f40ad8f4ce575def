"""Worlds in other processes act like worlds in this one, and no fault of theirs gets out."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
from faulty_worlds import Route, Routes
from prompts import grey, png

from selfwright.core.checked import checked_observation, checked_time_step
from selfwright.core.config import Config, Fleet
from selfwright.core.errors import PluginError, WorldError
from selfwright.core.hosting.pool import Worlds, open_worlds
from selfwright.core.hosting.spec import spec_of
from selfwright.core.hosting.world import World
from selfwright.core.images import STORE
from selfwright.core.tasks import StoredTask, task_data
from selfwright.core.types import Observation, TimeStep, WorldSpec

GONE_S = 10.0


@pytest.fixture(autouse=True)
def _fixtures_importable(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])


def fleet(**settings: Any) -> Fleet:
    return Fleet.model_validate({"parallel": 4, "reset_timeout_s": 20.0, **settings})


def hosted(
    kind: str,
    fault: str,
    use: Callable[[Worlds], Awaitable[None]],
    **settings: Any,
) -> None:
    async def run() -> None:
        opened = await open_worlds(f"faulty_worlds:{kind}", {"fault": fault}, fleet(**settings))
        async with opened as worlds:
            await use(worlds)

    asyncio.run(run())


async def episode(worlds: Worlds, world: World, *actions: str) -> list[object]:
    seen: list[object] = [await world.reset(await worlds.tasks("train").at(3), 11)]
    for action in actions:
        seen.append(await world.step(action))
    return seen


@pytest.mark.parametrize("kind", ["Faulty", "Apart", "Together"])
def test_both_kinds_of_hosting_show_the_same_world(kind: str) -> None:
    async def use(worlds: Worlds) -> None:
        tasks = worlds.tasks("validation")
        assert await tasks.size() == 40
        last, first, second = await tasks.take([39, 0, 1])
        assert (last.id, first.instruction) == ("validation 39", "Say right, 0.")
        assert second.id == "validation 1"
        for nowhere in (40, -1):
            with pytest.raises(IndexError, match=f"validation has 40 tasks, no {nowhere}"):
                await tasks.at(nowhere)
        assert worlds.abilities == {"expert", "random"}
        async with worlds.lease() as world:
            first, wrong, right = await episode(worlds, world, "löft\n", "right")
            assert isinstance(first, Observation)
            assert first.text.startswith("train 3: 0.4523795535098186")
            # The handle alone goes on; its bytes lie in this process's store.
            (image,) = first.images
            assert image.png == b"" and STORE.read(image) == png()
            assert (image.width, image.height) == (3, 2)
            assert wrong == TimeStep(Observation("1: löft\n"), 0.0, False)
            assert right == TimeStep(Observation("2: right"), 1.0, True, success=True)
            assert await world.expert() == "right"
            assert await world.random(1) == "left"
        assert len(worlds.processes) == (kind != "Faulty")

    hosted(kind, "", use)


@pytest.mark.parametrize("kind", ["Faulty", "Apart"])
def test_a_world_that_raises_is_named_and_can_go_on(kind: str) -> None:
    async def use(worlds: Worlds) -> None:
        async with worlds.lease() as world:
            with pytest.raises(Exception, match="fell off its edge") as caught:
                await episode(worlds, world, "fault")
            assert type(caught.value).__name__ == "ZeroDivisionError"
            assert not world.broken
            await episode(worlds, world, "right")
            worlds.discard(world)
        async with worlds.lease() as other:
            assert other is not world
            await episode(worlds, other, "right")

    hosted(kind, "raise", use)


@pytest.mark.parametrize("kind", ["Faulty", "Apart"])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("rubbish", r"gave dict \{'reward': 1\}; wanted a TimeStep"),
        ("not finite", "reward is float nan; wanted a finite float"),
    ],
)
def test_rubbish_is_refused_with_what_came_and_what_is_right(
    kind: str, fault: str, said: str
) -> None:
    async def use(worlds: Worlds) -> None:
        async with worlds.lease() as world:
            with pytest.raises(WorldError, match=said):
                await episode(worlds, world, "fault")

    hosted(kind, fault, use)


def test_every_field_of_an_answer_is_checked() -> None:
    shown = grey(7)
    right = TimeStep(Observation("here", (shown,), ("go",)), 0.5, True)
    assert checked_time_step(right, "w") == right
    whole = checked_time_step(replace(right, reward=1), "w").reward
    assert isinstance(whole, float)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"reward": "1"}, "reward is str '1'"),
        ({"reward": True}, "reward is bool"),
        ({"reward": float("inf")}, "reward is float inf"),
        ({"terminated": 1}, "terminated is int 1; wanted a bool"),
        ({"truncated": None}, "truncated is NoneType"),
        ({"terminated": False, "success": True}, "success without terminated"),
        ({"observation": "here"}, "gave str 'here'; wanted an Observation"),
        ({"observation": Observation(cast(str, b"here"))}, "text is bytes"),
        ({"observation": Observation("", cast(Any, (b"GIF89a",)))}, "images is tuple"),
        # A handle alone, one with another's bytes, and one that misstates its size.
        ({"observation": Observation("", (replace(shown, png=b""),))}, "images is tuple"),
        ({"observation": Observation("", (replace(shown, png=png()),))}, "images is tuple"),
        ({"observation": Observation("", (replace(shown, width=9),))}, "images is tuple"),
        ({"observation": Observation("", (), cast(Any, ["go"]))}, "actions is list"),
    ]
    for fields, said in wrong:
        with pytest.raises(WorldError, match=said):
            checked_time_step(replace(right, **fields), "w")
    with pytest.raises(WorldError, match="gave NoneType None; wanted an Observation"):
        checked_observation(None, "w")


@pytest.mark.parametrize("kind", ["Faulty", "Together"])
def test_a_hanging_instance_is_replaced_alone(kind: str) -> None:
    async def use(worlds: Worlds) -> None:
        async with worlds.lease() as sibling:
            before = worlds.processes
            async with worlds.lease() as world:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.2):
                        await episode(worlds, world, "fault")
                assert world.broken
                worlds.discard(world)
            assert world.gone and not sibling.gone
            await episode(worlds, sibling, "right")
            async with worlds.lease() as other:
                await episode(worlds, other, "right")
            assert worlds.processes == before

    hosted(kind, "hang", use)


def test_a_blocking_instance_takes_its_process_along_and_the_next_lease_works() -> None:
    async def use(worlds: Worlds) -> None:
        task = await worlds.tasks("train").at(0)
        async with worlds.lease() as sibling:
            await sibling.reset(task, 0)
            (process,) = worlds.processes
            async with worlds.lease() as world:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.2):
                        await episode(worlds, world, "fault")
                waiting = asyncio.create_task(sibling.step("right"))
                await asyncio.sleep(0)
            with pytest.raises(WorldError, match="hung, so its process and every instance"):
                await waiting
            with pytest.raises(WorldError, match="hung"):
                await sibling.step("right")
            assert sibling.gone
        assert worlds.processes == []
        assert (await worlds.tasks("train").at(1)).id == "train 1"  # a new process answers
        async with worlds.lease() as other:
            await episode(worlds, other, "right")
        assert process not in worlds.processes
        await gone(process)

    hosted("Together", "block", use)


def test_a_process_that_dies_is_reported_with_its_last_words() -> None:
    async def use(worlds: Worlds) -> None:
        async with worlds.lease() as world:
            with pytest.raises(WorldError) as caught:
                await episode(worlds, world, "fault")
            assert "died (exit code 7)" in str(caught.value)
            assert "the last thing I said" in str(caught.value)
            assert world.gone
        async with worlds.lease() as other:
            await episode(worlds, other, "right")
            os.kill(worlds.processes[0], signal.SIGKILL)
            with pytest.raises(WorldError, match="SIGKILL"):
                await other.step("left")

    hosted("Apart", "exit", use)


@pytest.mark.parametrize("fault", ["print", "read"])
def test_a_world_cannot_reach_the_streams_its_host_speaks_over(fault: str) -> None:
    async def use(worlds: Worlds) -> None:
        async with worlds.lease() as world:
            seen = await episode(worlds, world, "fault", "right")
            assert len(seen) == 3

    hosted("Apart", fault, use)


def test_a_world_that_does_not_start_says_why() -> None:
    for fault, limit, said in (
        ("no start", 20.0, "the licence has run out"),
        ("slow start", 1.5, "did not start within 1.5 s"),
    ):
        with pytest.raises(WorldError, match=said):
            hosted("Apart", fault, nothing, start_timeout_s=limit)


def test_names_and_settings_are_checked_before_anything_starts() -> None:
    async def run(name: str, config: dict[str, Any]) -> None:
        await open_worlds(name, config, fleet())

    with pytest.raises(PluginError):
        asyncio.run(run("no_such_world", {}))
    with pytest.raises(ValueError, match="fualt"):
        asyncio.run(run("faulty_worlds:Apart", {"fualt": "raise"}))


def test_at_most_as_many_play_as_the_fleet_says() -> None:
    async def use(worlds: Worlds) -> None:
        playing = most = 0

        async def play() -> None:
            nonlocal playing, most
            async with worlds.lease() as world:
                playing += 1
                most = max(most, playing)
                await episode(worlds, world, "left", "right")
                playing -= 1

        await asyncio.gather(*(play() for _ in range(20)))
        assert (playing, most) == (0, 3)
        assert len(worlds.processes) == 1

    hosted("Together", "", use, parallel=3)


def test_a_cancelled_episode_leaves_no_half_played_instance() -> None:
    async def use(worlds: Worlds) -> None:
        held: list[World] = []

        async def play() -> None:
            async with worlds.lease() as world:
                held.append(world)
                await episode(worlds, world, "fault")

        task = asyncio.create_task(play())
        until = time.monotonic() + GONE_S
        while not (held and held[0].broken):  # It is in mid-call.
            assert time.monotonic() < until
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with worlds.lease() as world:
            assert world is not held[0] and held[0].gone
            await episode(worlds, world, "right")

    hosted("Together", "hang", use, parallel=1)


def test_attempts_reach_over_to_another_process() -> None:
    async def run() -> None:
        settings = fleet(isolation="process")
        async with await open_worlds("faulty_worlds:Sum", {}, settings) as worlds:
            assert worlds.abilities >= {"answer", "without_oracle"}
            task = await worlds.tasks("test").at(0)
            assert await worlds.answer(task, "5") == "5"
            assert await worlds.answer(task, "five") is None
        mute = await open_worlds("faulty_worlds:Sum", {}, settings, without_oracle=True)
        async with mute, mute.lease() as world:
            await world.reset(await mute.tasks("test").at(0), 0)
            step = await world.step("4")
            assert (step.reward, step.terminated, step.observation.text) == (1.0, False, "4? Hm.")
        with pytest.raises(WorldError, match="no method 'without_oracle'"):
            await open_worlds("faulty_worlds:Apart", {}, fleet(), without_oracle=True)

    asyncio.run(run())


@pytest.mark.parametrize("isolation", ["inline", "process"])
def test_tasks_come_back_to_their_world_as_what_they_were(isolation: str) -> None:
    """Also those that were stored: away from their world they are data."""
    own = Routes(Config()).tasks("train")

    async def use(worlds: Worlds) -> None:
        for away, at_home in zip(await worlds.tasks("train").take(range(3)), own, strict=True):
            assert isinstance(away, Route if isolation == "inline" else StoredTask)
            stored = StoredTask(at_home.id, at_home.instruction, 9, task_data(away))
            longer = replace(at_home, max_steps=9)
            async with worlds.lease() as world:
                assert (await world.reset(away, 0)).text == repr(at_home)
                assert (await world.reset(stored, 0)).text == repr(longer)
                assert (await world.step("1")).answer == repr(at_home.legs[1:])
                assert (await world.step("on")).answer == ""
            if isolation == "process":
                assert await worlds.answer(stored, "0") == repr(at_home.legs)

    async def run() -> None:
        settings = fleet(isolation=isolation)
        async with await open_worlds("faulty_worlds:Routes", {}, settings) as worlds:
            await use(worlds)
            async with worlds.lease() as world:
                foreign = StoredTask("x", "Go.", 3, '{"url":"https://here"}')
                with pytest.raises(WorldError, match=r"'x'\.url: Route has no such field"):
                    await world.reset(foreign, 0)
        async with await open_worlds("faulty_worlds:Mistyped", {}, settings) as worlds:
            task = StoredTask("x", "Go.", 3, task_data(own[1]))
            async with worlds.lease() as world:
                with pytest.raises(
                    WorldError, match=r"spec names the class of its tasks: WorldSpec\(task="
                ):
                    await world.reset(task, 0)

    asyncio.run(run())


def test_what_a_class_says_of_itself_is_read_from_its_spec_or_its_attributes() -> None:
    class Plain:
        isolation = "inline"
        per_process = 3
        reward_range = (-1.0, 2.0)

    class Both(Plain):
        spec = WorldSpec(per_process=5)

    assert spec_of(Plain) == WorldSpec("inline", 3, reward_range=(-1.0, 2.0))
    assert spec_of(Both) == WorldSpec("process", 5)
    assert spec_of(object) == WorldSpec() and spec_of(Routes).task is Route
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"isolation": "thread"}, "isolation: Input should be 'inline' or 'process'"),
        ({"per_process": "4"}, "per_process"),
        ({"spec": {"isolation": "inline"}}, "is dict .*; wanted a WorldSpec"),
        ({"spec": WorldSpec(task=cast(Any, "Route"))}, "task"),
        ({"spec": WorldSpec(reward_range=cast(Any, (0.0,)))}, "reward_range"),
    ]
    for attributes, said in wrong:
        with pytest.raises(WorldError, match=f"Odd.spec.*{said}"):
            spec_of(type("Odd", (), attributes))


def test_closing_ends_every_process() -> None:
    processes: list[int] = []

    async def use(worlds: Worlds) -> None:
        async with worlds.lease() as one, worlds.lease() as other:
            await episode(worlds, one, "right")
            await episode(worlds, other, "right")
            processes.extend(worlds.processes)

    hosted("Apart", "", use)
    assert len(processes) == 2
    asyncio.run(gone(*processes))


PARENT = """
import asyncio, sys, time
import psutil
from selfwright.core.config import Fleet
from selfwright.core.hosting.pool import open_worlds

async def main():
    sys.path.append(sys.argv[1])
    worlds = await open_worlds(sys.argv[2], eval(sys.argv[3]), Fleet(parallel=2))
    async with worlds.lease() as world:
        await world.reset(await worlds.tasks("train").at(0), 0)
        family = psutil.Process().children(recursive=True)
        print(*(child.pid for child in family), flush=True)
        await world.step("fault")
        time.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("name", "config", "family"),
    [
        ("faulty_worlds:Apart", {"fault": "block"}, 1),
        pytest.param("textworld_express", {}, 2, marks=pytest.mark.jvm),
    ],
)
def test_a_killed_parent_leaves_nothing_behind(
    name: str, config: dict[str, str], family: int
) -> None:
    here = str(Path(__file__).parent)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, here, name, repr(config)], stdout=subprocess.PIPE
    )
    try:
        assert parent.stdout
        children = [int(word) for word in parent.stdout.readline().split()]
        assert len(children) >= family
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.communicate()
    asyncio.run(gone(*children))


async def nothing(worlds: Worlds) -> None:
    pass


async def gone(*processes: int) -> None:
    """Wait until they are."""
    deadline = time.monotonic() + GONE_S
    while living := [pid for pid in processes if _lives(pid)]:
        assert time.monotonic() < deadline, f"still alive: {living}"
        await asyncio.sleep(0.02)


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
