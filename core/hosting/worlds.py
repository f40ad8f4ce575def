"""Hosts worlds: in this process, or in processes of their own, here or on a cluster.

A process hosts ``per_process`` instances and speaks JSON lines over its standard streams; the other
end is ``core.world_process``. Whatever a world answers is checked before anyone sees it.
"""

import asyncio
import base64
import json
import math
import threading
from collections.abc import AsyncGenerator, Generator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, Protocol, Self, get_type_hints

from pydantic import TypeAdapter, ValidationError

from ..checked import (
    Tasks,
    UnreadableTask,
    checked_action,
    checked_answer,
    checked_expert,
    checked_observation,
    checked_time_step,
    readable,
    shown,
)
from ..config import Fleet
from ..errors import WorkerLost, WorldError
from ..images import STORE, picture
from ..plugins import load
from ..protocols import HasAttempts
from ..tasks import StoredTask, own_task, task_data
from ..types import Observation, Task, TimeStep, WorldSpec
from .local import GRACE_S, LocalWorker

LOSSES = 3
"""How often a worker of a cluster may be lost before what was asked of it counts as failed."""


class World(Protocol):
    """A leased instance. Every answer is checked; whatever fails raises."""

    attempts: bool
    """Every action is a whole attempt at the task (``HasAttempts``)."""
    broken: bool
    """To be thrown away: discarded, or a call was cancelled half-way."""

    @property
    def gone(self) -> bool:
        """Closed, or its process has died."""
        ...

    async def reset(self, task: Task, seed: int) -> Observation: ...
    async def step(self, action: str) -> TimeStep: ...
    async def expert(self) -> str | None: ...
    async def random(self, seed: int) -> str: ...
    async def close(self) -> None: ...


class Host(Protocol):
    """Where instances live."""

    @property
    def sample(self) -> Any: ...
    @property
    def processes(self) -> list[int]: ...
    def tasks(self, split: str) -> Any: ...
    async def open(self) -> None: ...
    async def add(self) -> World: ...
    async def drop(self, world: World) -> None: ...
    async def close(self) -> None: ...


class Worker(Protocol):
    """A process that hosts instances."""

    instances: int
    opened: Future[list[str]]
    """Its result: which optional methods the world has."""

    @property
    def pid(self) -> int | None:
        """None on another machine."""
        ...

    @property
    def dead(self) -> str | None:
        """Why the process is no more."""
        ...

    def call(self, what: str, **details: Any) -> Future[Any]: ...
    async def ask(self, what: str, **details: Any) -> Any: ...
    def kill(self, reason: str) -> None: ...
    async def stop(self) -> None: ...
    def last_words(self) -> str: ...


class Site(Protocol):
    """Where such processes are started."""

    def start(self, name: str, opening: dict[str, Any]) -> Worker: ...
    async def close(self) -> None: ...


class Worlds:
    """Instances of one world, made as needed, at most ``fleet.parallel`` in play at once."""

    def __init__(self, name: str, fleet: Fleet, host: Host) -> None:
        self.fleet = fleet
        self._name = name
        self._host = host
        self._free: list[World] = []
        self._room = asyncio.Semaphore(fleet.parallel)
        self.slots = asyncio.Semaphore(fleet.parallel)
        """One for each episode that may be in play; all rounds of rollouts share them."""
        self._closed = False

    @property
    def sample(self) -> Any:
        """For asking what the world can do: ``isinstance(sample, HasExpert)``, ``answer``."""
        return self._host.sample

    @property
    def processes(self) -> list[int]:
        """The ids of the processes that host instances now."""
        return self._host.processes

    def tasks(self, split: str) -> Sequence[Task]:
        """Each is looked at when it is asked for; see ``core.checked``."""
        return Tasks(self._host.tasks(split), self._name, split)

    @asynccontextmanager
    async def lease(self) -> AsyncGenerator[World]:
        """An instance of one's own; waits until one may be had."""
        async with self._room:
            if self._closed:
                raise WorldError(f"the worlds of {self._name} are closed; open them again")
            world = None
            while self._free and (world is None or world.gone):
                world = self._free.pop()
            if world is None or world.gone:
                world = await self._host.add()
            try:
                yield world
            finally:
                if world.broken and not world.gone:
                    await self._host.drop(world)
                if not world.gone:
                    self._free.append(world)

    def discard(self, world: object) -> None:
        """Throw away a leased instance that broke or hangs, when its lease ends.

        If its process then does not answer within ``GRACE_S``, the process is killed, and the
        other instances in it raise WorldError.
        """
        if isinstance(world, InlineWorld | RemoteWorld):
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
        WorldError: the first instance could not be made in ``fleet.reset_timeout_s``.
    """
    plugin = load("environments", name)
    text = json.dumps(config)
    settings = plugin.Config.model_validate_json(text)
    spec = spec_of(plugin)
    isolation = spec.isolation if fleet.isolation == "auto" else fleet.isolation
    host: Host
    opening = {"name": name, "config": text, "without_oracle": without_oracle}
    if fleet.on == "ray":
        host = await _on_ray(name, spec, opening, fleet)
    elif isolation == "inline":
        host = InlineHost(name, plugin, settings, spec, without_oracle)
    else:
        host = ProcessHost(name, opening, _per_process(spec, fleet), fleet, Here())
    try:
        await host.open()
    except BaseException:
        await host.close()
        raise
    return Worlds(name, fleet, host)


async def _on_ray(
    name: str, spec: WorldSpec, opening: dict[str, Any], fleet: Fleet
) -> "ProcessHost":
    from .ray import Cluster

    cluster = Cluster(name)
    try:
        await asyncio.to_thread(cluster.join, fleet.parallel)
    except BaseException:
        await cluster.close()
        raise
    # Those that may share a process do so, but are still spread over all of the cluster.
    share = math.ceil(fleet.parallel / cluster.hosts)
    per_process = min(_per_process(spec, fleet), share)
    return ProcessHost(name, opening, per_process, fleet, cluster)


def _per_process(spec: WorldSpec, fleet: Fleet) -> int:
    # Worlds that never block lose nothing by sharing a process.
    return spec.per_process or (fleet.parallel if spec.isolation == "inline" else 1)


@contextmanager
def call_to(world: World) -> Generator[None]:
    """Notices when a call does not come to its end."""
    before, world.broken = world.broken, True
    try:
        yield
    except Exception:
        world.broken = before
        raise
    world.broken = before


class InlineWorld:
    """An instance in this process."""

    def __init__(self, name: str, instance: Any, spec: WorldSpec) -> None:
        self.instance = instance
        self.attempts = isinstance(instance, HasAttempts)
        self.broken = False
        self.gone = False
        self._name = name
        self._spec = spec
        self._task: Task | None = None

    async def reset(self, task: Task, seed: int) -> Observation:
        self._task = own_task(self._spec.task, readable(task))
        with call_to(self):
            seen = checked_observation(await self.instance.reset(self._task, seed), self._name)
        return kept(seen)

    async def step(self, action: str) -> TimeStep:
        with call_to(self):
            done = checked_time_step(await self.instance.step(action), self._name)
            assert self._task is not None, "it answered, so it was reset"
            done = answered(self.instance, self._task, action, done, self._name)
        return replace(done, observation=kept(done.observation))

    async def expert(self) -> str | None:
        with call_to(self):
            return checked_expert(await offered(self.instance, "expert", self._name)(), self._name)

    async def random(self, seed: int) -> str:
        with call_to(self):
            drawn = await offered(self.instance, "random", self._name)(seed)
            return checked_action(drawn, self._name, "random")

    async def close(self) -> None:
        self.gone = True
        await self.instance.close()


class InlineHost:
    """Instances in this process."""

    def __init__(
        self, name: str, plugin: type[Any], settings: Any, spec: WorldSpec, without_oracle: bool
    ) -> None:
        self.processes: list[int] = []
        self._name = name
        self._plugin = plugin
        self._spec = spec
        self._settings = settings
        self._without_oracle = without_oracle
        self._sample: Any = None
        self._spare: list[Any] = []
        self._worlds: set[InlineWorld] = set()

    @property
    def sample(self) -> Any:
        return self._sample

    async def open(self) -> None:
        self._sample = self._make()
        self._spare.append(self._sample)

    def tasks(self, split: str) -> Any:
        return self._sample.tasks(split)

    async def add(self) -> World:
        instance = self._spare.pop() if self._spare else self._make()
        world = InlineWorld(self._name, instance, self._spec)
        self._worlds.add(world)
        return world

    async def drop(self, world: World) -> None:
        assert isinstance(world, InlineWorld)
        self._worlds.discard(world)
        with suppress(Exception):
            async with asyncio.timeout(GRACE_S):
                await world.close()

    async def close(self) -> None:
        for world in list(self._worlds):
            await self.drop(world)
        for instance in self._spare:
            await self.drop(InlineWorld(self._name, instance, self._spec))

    def _make(self) -> Any:
        return made(self._name, self._plugin, self._settings, self._without_oracle)


class RemoteTasks:
    """A split of a world in another process; items are fetched when asked for."""

    def __init__(self, host: "ProcessHost", split: str) -> None:
        self._host = host
        self._split = split
        self._length = int(host.ask_now("tasks", split=split))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Task:
        """``index``: from 0 to the length, not from the end."""
        asked = self._host.ask_now("task", split=self._split, index=index)
        name, instruction, max_steps, data, fault = asked
        if fault:
            return UnreadableTask(name, instruction, max_steps, fault)
        return StoredTask(name, instruction, max_steps, data)


class RemoteSample:
    """Stands for an instance in another process when its abilities are asked about."""

    def __init__(self, host: "ProcessHost", offers: Sequence[str]) -> None:
        self._host = host
        # Set on the instance, so that isinstance with the optional protocols tells the truth.
        for name in offers:
            setattr(self, name, getattr(self, f"_{name}"))

    def tasks(self, split: str) -> RemoteTasks:
        return self._host.tasks(split)

    def _answer(self, task: Task, action: str) -> str | None:
        return self._host.ask_now("answer", task=fields_of(task), action=action)

    def _without_oracle(self) -> Any:
        raise WorldError("in another process; use open_worlds(..., without_oracle=True)")

    async def _expert(self) -> str | None:
        raise WorldError("the sample plays no episode; lease an instance")

    async def _random(self, seed: int) -> str:
        raise WorldError("the sample plays no episode; lease an instance")


class RemoteWorld:
    """An instance in another process."""

    def __init__(self, worker: Worker, number: int, name: str, attempts: bool) -> None:
        self.worker = worker
        self.number = number
        self.attempts = attempts
        self.broken = False
        self._left = False
        self._name = name

    @property
    def gone(self) -> bool:
        return self._left or self.worker.dead is not None

    async def reset(self, task: Task, seed: int) -> Observation:
        return observation_from(await self._ask("reset", task=fields_of(task), seed=seed))

    async def step(self, action: str) -> TimeStep:
        answer = await self._ask("step", action=action)
        return TimeStep(observation_from(answer.pop("observation")), **answer)

    async def expert(self) -> str | None:
        return await self._ask("expert")

    async def random(self, seed: int) -> str:
        return await self._ask("random", seed=seed)

    async def close(self) -> None:
        self._left = True
        await self.worker.ask("drop", instance=self.number)
        self.worker.instances -= 1

    async def _ask(self, what: str, **details: Any) -> Any:
        if self._left:
            raise WorldError(f"this instance of {self._name} was discarded; lease another")
        with call_to(self):
            return await self.worker.ask(what, instance=self.number, **details)


class ProcessHost:
    """Instances in processes of their own."""

    def __init__(
        self, name: str, opening: dict[str, Any], per_process: int, fleet: Fleet, site: Site
    ) -> None:
        self._name = name
        self._opening = opening
        self._site = site
        self._per_process = min(per_process, fleet.parallel)
        self._deadline_s = fleet.reset_timeout_s
        self._workers: list[Worker] = []
        self._lock = threading.RLock()
        """Of ``_workers``, which those who ask now look through, too, and from any thread."""
        self._open = True
        self._tasks: dict[str, RemoteTasks] = {}
        self._sample: RemoteSample | None = None
        self._made = 0

    @property
    def sample(self) -> Any:
        return self._sample

    @property
    def processes(self) -> list[int]:
        return [worker.pid for worker in self._living() if worker.pid is not None]

    async def open(self) -> None:
        offers = await self._opened(self._start())
        self._sample = RemoteSample(self, offers)

    def tasks(self, split: str) -> RemoteTasks:
        if split not in self._tasks:
            self._tasks[split] = RemoteTasks(self, split)
        return self._tasks[split]

    def ask_now(self, what: str, **details: Any) -> Any:
        """Ask any instance, and wait: for what answers at once."""
        losses = 0
        while True:
            with self._lock:
                living = self._living()
                worker = living[0] if living else self._start()
            try:
                worker.opened.result(self._deadline_s)
                return worker.call(what, **details).result(self._deadline_s)
            except WorkerLost:
                losses += 1
                if losses > LOSSES:
                    raise
            except TimeoutError:
                raise WorldError(
                    f"{self._name} did not answer {what!r} within {self._deadline_s:g} s"
                ) from None

    async def add(self) -> World:
        with self._lock:
            worker = next((w for w in self._living() if w.instances < self._per_process), None)
            worker = worker or self._start()
        worker.instances += 1  # at once: others are asking, too
        self._made += 1
        number = self._made
        try:
            await self._opened(worker)
            async with asyncio.timeout(self._deadline_s):
                await worker.ask("add", instance=number)
        except BaseException as error:
            worker.instances -= 1
            if worker.dead is None:
                worker.call("drop", instance=number)
            if isinstance(error, TimeoutError):
                raise WorldError(
                    f"no instance of {self._name} was made within {self._deadline_s:g} s"
                ) from None
            raise
        return RemoteWorld(worker, number, self._name, isinstance(self._sample, HasAttempts))

    async def drop(self, world: World) -> None:
        assert isinstance(world, RemoteWorld)
        try:
            async with asyncio.timeout(GRACE_S):
                await world.close()
        except TimeoutError:
            world.worker.kill(
                f"a call to {self._name} hung, so its process and every instance in it was ended"
            )
        except WorldError:
            pass

    async def close(self) -> None:
        with self._lock:
            self._open = False
        await asyncio.gather(*(worker.stop() for worker in self._workers))
        await self._site.close()

    def _living(self) -> list[Worker]:
        with self._lock:
            self._workers = [worker for worker in self._workers if worker.dead is None]
            return list(self._workers)

    def _start(self) -> Worker:
        with self._lock:
            if not self._open:
                raise WorldError(f"the worlds of {self._name} are closed; open them again")
            worker = self._site.start(self._name, self._opening)
            self._workers.append(worker)
        return worker

    async def _opened(self, worker: Worker) -> list[str]:
        try:
            async with asyncio.timeout(self._deadline_s):
                return await asyncio.shield(asyncio.wrap_future(worker.opened))
        except TimeoutError:
            worker.kill(f"{self._name} did not start within {self._deadline_s:g} s")
            raise WorldError(f"{worker.dead}{worker.last_words()}") from None


class Here:
    """Processes on this machine, that die with this one."""

    def start(self, name: str, opening: dict[str, Any]) -> Worker:
        return LocalWorker(name, opening)

    async def close(self) -> None:
        pass


def made(name: str, plugin: type[Any], settings: Any, without_oracle: bool) -> Any:
    """An instance of ``plugin``."""
    instance = plugin(settings)
    return offered(instance, "without_oracle", name)() if without_oracle else instance


def offered(instance: Any, method: str, world: str) -> Any:
    """An optional method.

    Raises:
        WorldError: the world does not have it.
    """
    found = getattr(instance, method, None)
    if found is None:
        raise WorldError(f"{world} has no method {method!r}")
    return found


def fields_of(task: Task) -> tuple[str, str, int, str]:
    """A task for another process. Raises: WorldError: it cannot be played."""
    task = readable(task)
    return task.id, task.instruction, task.max_steps, task_data(task)


_SPEC: dict[str, TypeAdapter[Any]] = {
    name: TypeAdapter(kind) for name, kind in get_type_hints(WorldSpec).items()
}


def spec_of(plugin: type[Any]) -> WorldSpec:
    """What a world's class says of itself.

    Without a ``spec`` these are read as class attributes: ``isolation``, ``per_process``,
    ``reward_range``.

    Raises:
        WorldError: a field has a value that is none of its.
    """
    told = getattr(plugin, "spec", None)
    if told is None:
        names = ("isolation", "per_process", "reward_range")
        told = WorldSpec(**{n: getattr(plugin, n) for n in names if hasattr(plugin, n)})
    if not isinstance(told, WorldSpec):
        raise WorldError(f"{plugin.__name__}.spec is {shown(told)}; wanted a WorldSpec")
    for name, kind in _SPEC.items():
        try:
            kind.validate_python(getattr(told, name), strict=True)
        except ValidationError as error:
            faults = error.errors(include_url=False)
            said = "; ".join(
                ".".join([name, *map(str, f["loc"])]) + f": {f['msg']}" for f in faults
            )
            raise WorldError(f"{plugin.__name__}.spec.{said}") from None
    return told


def answered(instance: Any, task: Task, action: str, done: TimeStep, world: str) -> TimeStep:
    """``done``, with the answer that the action gives, where a world has such.

    Raises:
        WorldError: it is no text.
    """
    if done.answer is not None or not isinstance(instance, HasAttempts):
        return done
    return replace(done, answer=checked_answer(instance.answer(task, action), world) or "")


def kept(observation: Observation) -> Observation:
    """The same, its pictures' bytes in this process's store."""
    if not observation.images:
        return observation
    return replace(observation, images=tuple(map(STORE.keep, observation.images)))


def observation_from(fields: dict[str, Any]) -> Observation:
    images = tuple(STORE.keep(picture(base64.b64decode(image))) for image in fields["images"])
    return Observation(fields["text"], images, tuple(fields["actions"]), fields["actor"])
