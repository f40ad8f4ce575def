"""Worlds on a Ray cluster play as they do here, even when workers are killed."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from components import SINGLE, played
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

from selfwright.core import draft as drafts
from selfwright.core import recipe as recipes
from selfwright.core.config import Fleet
from selfwright.core.errors import RecipeError, WorldError
from selfwright.core.files import read_json
from selfwright.core.hosting.pool import open_worlds
from selfwright.core.hosting.process import LOSSES, RemoteWorld
from selfwright.core.hosting.ray import Cluster, RayWorker
from selfwright.core.hosting.world import World
from selfwright.core.play.players import ExpertPlayer
from selfwright.core.play.rollout import rollouts
from selfwright.core.types import (
    Action,
    Completion,
    Observation,
    Start,
    Step,
    Stop,
    Task,
    Trajectory,
)

pytestmark = pytest.mark.multi

HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def _one_cluster() -> Generator[None]:  # pyright: ignore[reportUnusedFunction]
    """Ray is started once, and what the tests leave of it is gone in the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setattr(sys, "path", [*sys.path, str(HERE), str(HERE.parent / "examples")])
        kept = Cluster("tests")
        kept.join(1)
        yield
        ours = ray_processes()
        assert ours
        asyncio.run(kept.close())
        until = time.monotonic() + 30
        while any(one.is_running() for one in ours) and time.monotonic() < until:
            time.sleep(0.05)
        assert not [one for one in ours if one.is_running()]


def ray_processes() -> list[psutil.Process]:
    """Those that serve the cluster, and what they have started; not the guardian of our own."""
    found: list[psutil.Process] = []
    for one in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # Some are on their way out; zombies have no command.
            if not any("children.py" in word for word in one.cmdline()):
                found.append(one)
    return found


class Player:
    """Says a word that depends on seed and turn; counts how often it is asked."""

    name = "player"

    def __init__(self, meddle: Callable[[World, Task, int], object] | None = None) -> None:
        self.asked = 0
        self._meddle = meddle

    def batch_slot(self) -> AbstractContextManager[None]:
        return nullcontext()

    async def act(
        self,
        world: World,
        task: Task,
        history: Sequence[Step],
        observation: Observation,
        seed: int,
    ) -> Action | None:
        self.asked += 1
        if self._meddle is not None:
            await asyncio.to_thread(self._meddle, world, task, len(history))
        word = "right" if len(history) == 3 else f"{seed % 1000} {observation.text[:5]}"
        return Action(word, Completion(word))


def ray_host(world: World) -> int:
    """The process id of the actor that hosts the world."""
    import ray

    assert isinstance(world, RemoteWorld) and isinstance(world.worker, RayWorker)
    handle: Any = world.worker._handle  # pyright: ignore[reportPrivateUsage]
    get: Any = ray.get
    return int(get(handle.actor.pid.remote(), timeout=30))


def episodes(
    on: str, name: str, player: Any, config: dict[str, Any] | None = None, **settings: Any
) -> list[Trajectory]:
    """Twelve episodes; their tasks as plain ones, wherever they were made."""

    async def run() -> list[Trajectory]:
        fleet = Fleet.model_validate({"parallel": 4, "on": on, **settings})
        async with await open_worlds(name, config or {}, fleet) as worlds:
            tasks = await worlds.tasks("train").take(range(3))
            starts = [Start(tasks[k % 3], 100 + k % 3, k // 3) for k in range(12)]
            return await rollouts(player, worlds, starts, 7)

    return [replace(one, task=plain(one.task)) for one in asyncio.run(run())]


def plain(task: Task) -> Task:
    return Task(task.id, task.instruction, task.max_steps)


def test_plays_as_here() -> None:
    name, player = "higher_lower.world:HigherLower", ExpertPlayer(noise=0.3)
    here = episodes("local", name, player)
    there = episodes("ray", name, player)
    assert here == there
    assert {one.stop for one in here} <= {Stop.TERMINATED, Stop.TRUNCATED}
    assert len({one.steps for one in here}) > 1


def test_workers_are_spread_and_listen_on_loopback_only() -> None:
    hosts = set[int]()
    episodes(
        "ray", "faulty_worlds:Together", Player(lambda world, task, at: hosts.add(ray_host(world)))
    )
    assert len(hosts) == min(4, len(os.sched_getaffinity(0)))
    listening: list[str] = []
    for one in ray_processes():
        with suppress(psutil.NoSuchProcess):  # Some are on their way out.
            places = one.net_connections("tcp")
            listening += [at.laddr.ip for at in places if at.status == psutil.CONN_LISTEN]
    assert listening and set(listening) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.mark.parametrize(("name", "turn"), [("countdown", 0), ("faulty_worlds:Apart", 1)])
def test_a_killed_worker_costs_nothing(name: str, turn: int) -> None:
    undisturbed = Player()
    here = episodes("local", name, undisturbed)
    killed: list[int] = []
    once = threading.Lock()

    def kill(world: World, task: Task, at: int) -> None:
        with once:
            if at == turn and not killed:
                killed.append(ray_host(world))
                os.kill(killed[0], signal.SIGKILL)

    meddler = Player(kill)
    there = episodes("ray", name, meddler)
    assert killed
    assert here == there
    # Nobody was asked twice, so no token is sampled, or counted, twice.
    assert meddler.asked == undisturbed.asked == sum(len(one.steps) for one in here)


def test_an_episode_that_loses_every_worker_has_failed() -> None:
    killed: list[int] = []

    def kill(world: World, task: Task, at: int) -> None:
        if "0" in task.id:
            killed.append(ray_host(world))
            os.kill(killed[-1], signal.SIGKILL)

    async def run() -> Trajectory:
        fleet = Fleet.model_validate({"parallel": 1, "on": "ray", "max_failures": 1.0})
        async with await open_worlds("faulty_worlds:Apart", {}, fleet) as worlds:
            task = await worlds.tasks("train").at(0)
            return (await rollouts(Player(kill), worlds, [Start(task, 1)], 7))[0]

    lost = asyncio.run(run())
    assert lost.stop == Stop.FAILED
    assert lost.error.startswith(
        "WorkerLost: a Ray worker that hosted faulty_worlds:Apart was lost"
    )
    assert len(killed) == LOSSES + 1


def test_a_broken_world_is_no_lost_worker() -> None:
    settings = {"max_failures": 1.0}
    for fault in ("raise", "exit"):
        player = Says("fault")
        here = episodes("local", "faulty_worlds:Apart", player, {"fault": fault}, **settings)
        there = episodes("ray", "faulty_worlds:Apart", player, {"fault": fault}, **settings)
        assert [one.error for one in here] == [one.error for one in there]
        assert all(one.stop == Stop.FAILED and not one.steps for one in there)


def test_a_process_that_dies_at_a_living_host_is_replaced() -> None:
    async def use(world: World, task: Task, word: str) -> float:
        await world.reset(task, 0)
        return (await world.step(word)).reward

    async def run() -> None:
        parallel = 2 * len(os.sched_getaffinity(0))  # so that two share a process
        fleet = Fleet.model_validate({"parallel": parallel, "on": "ray"})
        name = "faulty_worlds:Together"
        async with await open_worlds(name, {"fault": "exit"}, fleet) as worlds:
            task = await worlds.tasks("train").at(0)
            for split in ("validation", "test"):
                async with worlds.lease() as world, worlds.lease() as sibling:
                    assert isinstance(world, RemoteWorld) and isinstance(sibling, RemoteWorld)
                    assert world.worker is sibling.worker
                    assert await use(sibling, task, "right") == 1
                    host = ray_host(world)
                    with pytest.raises(WorldError, match=r"died \(exit code 7\)"):
                        await use(world, task, "fault")
                    with pytest.raises(WorldError, match=r"died \(exit code 7\)"):
                        await use(sibling, task, "right")
                    assert world.gone and sibling.gone
                    assert psutil.pid_exists(host)
                if split == "test":
                    assert (await worlds.tasks(split).at(1)).id == "test 1"
                async with worlds.lease() as other:
                    assert await use(other, task, "right") == 1

    asyncio.run(run())


class Says(Player):
    def __init__(self, word: str) -> None:
        super().__init__()
        self._word = word

    async def act(
        self,
        world: World,
        task: Task,
        history: Sequence[Step],
        observation: Observation,
        seed: int,
    ) -> Action | None:
        return Action(self._word, Completion(self._word))


def test_a_world_that_blocks_is_given_up_in_time() -> None:
    began = time.monotonic()
    settings = {"max_failures": 1.0, "step_timeout_s": 0.5, "parallel": 12}
    config = {"fault": "block"}
    there = episodes("ray", "faulty_worlds:Apart", Says("fault"), config, **settings)
    assert {one.error for one in there} == {"TimeoutError: the world's step took longer than 0.5 s"}
    assert time.monotonic() - began < 40


def test_a_run_is_the_same(player: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(SINGLE.replace("MODEL", str(player)))
    for on in ("local", "ray"):
        played(file, [f"environment.on={on}", "iterations=2"], tmp_path / on)
        # Whoever plays the checkpoint later need not have a cluster.
        card = read_json(tmp_path / on / "checkpoint/selfwright.json")
        recipe = read_json(tmp_path / on / "recipe.json")
        assert (recipe["environment"]["on"], card["environment"]["on"]) == (on, "local")
    here, there = (
        load_file(tmp_path / on / "checkpoint/adapter_model.safetensors") for on in ("local", "ray")
    )
    assert all(here[name].equal(there[name]) for name in here)
    for index in range(2):
        one, two = (
            read_json(tmp_path / on / f"iterations/{index:04d}/metrics.json")
            for on in ("local", "ray")
        )
        assert {k: v for k, v in one.items() if not k.startswith("time/")} == {
            k: v for k, v in two.items() if not k.startswith("time/")
        }


ALONE = """
import asyncio, sys
from selfwright.core.config import Fleet
from selfwright.core.hosting.ray import Cluster
from selfwright.core.hosting.pool import open_worlds

FLEET = Fleet(parallel=1, on="ray")

def started():
    ready = getattr(sys.modules.get("ray"), "is_initialized", None)
    return ready is not None and ready()

def starting():
    return "ray" in sys.modules and not started()

async def play():
    async with await open_worlds("countdown", {}, FLEET) as worlds, worlds.lease() as world:
        await world.reset(await worlds.tasks("train").at(0), 0)

async def played_meanwhile():
    playing, turns = asyncio.create_task(play()), 0
    while not started() and not playing.done():
        turns += starting()
        await asyncio.sleep(0.01)
    await playing
    return turns

async def played_while_the_last_one_leaves():
    cluster = Cluster("first")
    await asyncio.to_thread(cluster.join, 1)
    closing = asyncio.create_task(cluster.close())
    await asyncio.sleep(0)
    await play()
    await closing

async def given_up():
    joining = asyncio.create_task(play())
    while not starting():
        await asyncio.sleep(0.01)
    joining.cancel()
    await asyncio.wait([joining])
    return joining.cancelled()
"""
"""For a process in which nobody else uses Ray."""


def test_a_cluster_starts_and_leaves_beside_what_else_goes_on() -> None:
    """A start that nobody waits for any more is undone; worlds are opened while the last ones are
    closed; and others go on while it starts."""
    asked = ("given_up", "played_while_the_last_one_leaves", "played_meanwhile")
    code = ALONE + "".join(f"\nprint(asyncio.run({one}()), started())" for one in asked)
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False
    )
    assert told.returncode == 0, told.stderr
    *others, turns = told.stdout.splitlines()
    assert others == ["True False", "None False"], "none leaves a Ray behind"
    assert int(turns.removesuffix(" False")) > 10, "turns of 10 ms of what takes a second"


def test_what_cannot_be_is_refused_with_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(SINGLE)
    wanted = ["environment.on=ray"]
    assert recipes.read(file, wanted).fleet.on == "ray"
    with pytest.raises(RecipeError, match=r"environment\.on: isolation: inline keeps the"):
        recipes.read(file, [*wanted, "environment.isolation=inline"])
    monkeypatch.setattr(drafts, "find_spec", lambda name: None)  # pyright: ignore
    with pytest.raises(RecipeError, match=r"not installed: pip install 'selfwright\[ray\]'"):
        recipes.read(file, wanted)
