"""Instances of a world, made as needed and leased, and its tasks: wherever they are hosted."""

import asyncio
import json
import math
import os
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

from ..checked import checked_task
from ..config import Fleet
from ..errors import PluginError, WorldError
from ..plugins import load, names
from ..types import Task, WorldSpec
from .inline import InlineHost
from .process import Here, ProcessHost
from .snapshots import Snapshots
from .spec import spec_of
from .worker import Launch, Opening
from .world import Host, World


class Split:
    """The tasks of ``train``, ``validation`` or ``test``, each looked at when it is asked for."""

    def __init__(self, host: Host, world: str, name: str) -> None:
        self._host = host
        self._where = f"{world}: {name}"
        self._name = name
        self._size: int | None = None

    async def size(self) -> int:
        """Raises: WorldError: it is no sequence, or nobody answers in time."""
        if self._size is None:
            self._size = await self._host.size(self._name)
        return self._size

    async def take(self, indices: Sequence[int]) -> list[Task]:
        """The tasks at these places, counted from 0.

        Raises:
            IndexError: there is no such place. WorldError: there is no task.
        """
        size = await self.size()
        for k in indices:
            if not 0 <= k < size:
                raise IndexError(f"{self._where} has {size} tasks, no {k}")
        found = await self._host.take(self._name, indices)
        pairs = zip(indices, found, strict=True)
        return [checked_task(task, f"{self._where}[{k}]") for k, task in pairs]

    async def at(self, index: int) -> Task:
        return (await self.take([index]))[0]


class Worlds:
    """Instances of one world, at most ``fleet.parallel`` in play at once."""

    def __init__(self, name: str, fleet: Fleet, host: Host) -> None:
        self.fleet = fleet
        self.snapshots: Snapshots | None = None
        """Where states of episodes are kept, if anybody will go on from them."""
        self.slots = asyncio.Semaphore(fleet.parallel)
        """One for each episode that may be in play; all rounds of rollouts share them."""
        self._name = name
        self._host = host
        self._free: list[World] = []
        self._room = asyncio.Semaphore(fleet.parallel)
        self._closed = False

    @property
    def spec(self) -> WorldSpec:
        """What the world's class says of itself."""
        return self._host.spec

    @property
    def abilities(self) -> frozenset[str]:
        """What its instances can do beyond the least: ``far_end.ABILITIES``."""
        return self._host.abilities

    @property
    def processes(self) -> list[int]:
        """The ids of the processes that host instances now."""
        return self._host.processes

    def keep_snapshots(self) -> None:
        """From now on keep a state of every step, if the world can go on from such."""
        if self.abilities >= {"snapshot", "restore"} and self.snapshots is None:
            self.snapshots = Snapshots()

    def tasks(self, split: str) -> Split:
        return Split(self._host, self._name, split)

    async def named(self, name: str) -> Task:
        """The training task of that id. Raises: WorldError, ValueError: there is none."""
        return checked_task(await self._host.named(name), f"named({name!r})")

    async def answer(self, task: Task, action: str) -> str | None:
        """The answer that an attempt gives (``HasAttempts``)."""
        return await self._host.answer(task, action)

    @asynccontextmanager
    async def lease(self) -> AsyncGenerator[World]:
        """An instance of one's own; waits until one may be had."""
        async with self._room:
            if self._closed:
                raise WorldError(f"the worlds of {self._name} are closed; open them again")
            world = await self._kept() or await self._host.add()
            try:
                yield world
            finally:
                if not world.gone and (world.broken or world.worn):
                    await self._host.drop(world)
                if not world.gone:
                    self._free.append(world)

    async def _kept(self) -> World | None:
        """One that was played in before, if there is one that can go on."""
        while self._free:
            world = self._free.pop()
            if world.worn and not world.gone:
                await self._host.drop(world)
            if not world.gone:
                return world
        return None

    def discard(self, world: World) -> None:
        """Throw away a leased instance that broke or hangs, when its lease ends.

        If its process then does not answer within ``GRACE_S``, the process is killed, and the
        other instances in it raise WorldError.
        """
        world.broken = True

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            await self._host.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


async def open_worlds(
    name: str, config: dict[str, Any], fleet: Fleet, *, without_oracle: bool = False
) -> Worlds:
    """Host the world called ``name`` (an entry point, or ``module:Class``).

    ``without_oracle``: every instance is ``instance.without_oracle()``.

    Raises:
        PluginError: there is no such world.
        pydantic.ValidationError: ``config`` is not the world's.
        WorldError: the first instance could not be made in time.
    """
    host = await _host(name, config, fleet, without_oracle)
    try:
        await host.open()
    except BaseException:
        await host.close()
        raise
    return Worlds(name, fleet, host)


def launch_of(
    name: str, config: dict[str, Any], fleet: Fleet, without_oracle: bool = False
) -> Launch:
    """How a process that hosts that world is started. Raises: PluginError: nobody knows it."""
    target = "" if fleet.command else _target(name)
    path = (os.getcwd(),) if fleet.elsewhere else tuple(sys.path)
    opening = Opening(name, target, json.dumps(config), without_oracle, path)
    return Launch(opening, fleet.python, fleet.command)


async def _host(name: str, config: dict[str, Any], fleet: Fleet, without_oracle: bool) -> Host:
    if fleet.elsewhere:
        launch = launch_of(name, config, fleet, without_oracle)
        return ProcessHost(launch, None, 1, fleet, Here())
    plugin = load("environments", name)
    settings = plugin.Config.model_validate_json(json.dumps(config))
    spec = spec_of(plugin)
    if without_oracle and not hasattr(plugin, "without_oracle"):
        raise WorldError(f"{name} has no method 'without_oracle'")
    launch = launch_of(name, config, fleet, without_oracle)
    if fleet.on == "ray":
        return await _on_ray(launch, spec, fleet)
    isolation = spec.isolation if fleet.isolation == "auto" else fleet.isolation
    if isolation == "process":
        return ProcessHost(launch, spec, _per_process(spec, fleet), fleet, Here())

    def make() -> Any:
        return plugin(settings).without_oracle() if without_oracle else plugin(settings)

    return InlineHost(name, plugin, make, spec)


async def _on_ray(launch: Launch, spec: WorldSpec, fleet: Fleet) -> ProcessHost:
    from .ray import Cluster

    cluster = Cluster(launch.opening.world)
    try:
        await asyncio.to_thread(cluster.join, fleet.parallel)
    except BaseException:
        await cluster.close()
        raise
    # Those that may share a process do so, but are still spread over all of the cluster.
    share = math.ceil(fleet.parallel / cluster.hosts)
    return ProcessHost(launch, spec, min(_per_process(spec, fleet), share), fleet, cluster)


def _per_process(spec: WorldSpec, fleet: Fleet) -> int:
    # Worlds that never block lose nothing by sharing a process.
    return spec.per_process or (fleet.parallel if spec.isolation == "inline" else 1)


def _target(name: str) -> str:
    """``module:Class`` of a world's name. Raises: PluginError: nobody here knows it."""
    if ":" in name:
        return name
    known = names("environments")
    if name not in known:
        raise PluginError(f"no world is called {name!r} here; elsewhere they are module:Class")
    return known[name].target
