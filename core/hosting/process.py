"""Instances in processes of their own, here or on a cluster."""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, Protocol, TypeVar

from ..config import Fleet
from ..errors import WorkerLost, WorldError
from ..types import Observation, Task, TimeStep, WorldSpec
from .spec import has_attempts, spec_from
from .wire import observation_from, task_from, task_to, time_step_from
from .worker import GRACE_S, Launch, LocalWorker, Worker
from .world import World, call_to

T = TypeVar("T")

LOSSES = 3
"""How often a worker of a cluster may be lost before what was asked of it counts as failed."""
BATCH = 256
"""Tasks that are asked for at once."""


class Site(Protocol):
    """Where processes are started."""

    def start(self, launch: Launch) -> Worker: ...
    async def close(self) -> None: ...


class Here:
    """Processes on this machine, that die with this one."""

    def start(self, launch: Launch) -> Worker:
        return LocalWorker(launch)

    async def close(self) -> None:
        pass


class RemoteWorld:
    """An instance in another process."""

    def __init__(self, worker: Worker, number: int, host: "ProcessHost") -> None:
        self.worker = worker
        self.number = number
        self.attempts = has_attempts(host.abilities)
        self.broken = False
        self.snapshots = False
        self.snapshot = ""
        self._left = False
        self._name = host.name
        self._recycle_after = host.spec.recycle_after

    @property
    def gone(self) -> bool:
        return self._left or self.worker.dead is not None

    @property
    def worn(self) -> bool:
        return self._recycle_after is not None and self.worker.episodes >= self._recycle_after

    async def reset(self, task: Task, seed: int) -> Observation:
        self.snapshot = ""
        self.worker.episodes += 1
        seen, blobs = await self._ask("reset", task=task_to(task), seed=seed)
        return observation_from(seen, blobs, self._name)

    async def step(self, action: str) -> TimeStep:
        more = {"snapshot": True} if self.snapshots else {}
        answer, blobs = await self._ask("step", action=action, **more)
        self.snapshot = answer.get("snapshot", "")
        return time_step_from(answer, blobs, self._name)

    async def expert(self) -> str | None:
        return (await self._ask("expert"))[0]

    async def random(self, seed: int) -> str:
        return (await self._ask("random", seed=seed))[0]

    async def restore(self, task: Task, snapshot: str) -> Observation:
        self.snapshot = snapshot
        self.worker.episodes += 1
        seen, blobs = await self._ask("restore", task=task_to(task), state=snapshot)
        return observation_from(seen, blobs, self._name)

    async def close(self) -> None:
        self._left = True
        self.worker.instances -= 1
        await self.worker.ask("drop", instance=self.number)

    async def _ask(self, what: str, **details: Any) -> Any:
        if self._left:
            raise WorldError(f"this instance of {self._name} was discarded; lease another")
        with call_to(self):
            return await self.worker.ask(what, instance=self.number, **details)


class ProcessHost:
    """Instances in processes, and a process that is only asked about tasks."""

    def __init__(
        self, launch: Launch, spec: WorldSpec | None, per_process: int, fleet: Fleet, site: Site
    ) -> None:
        """``spec``: None of a world whose class is not here; it is then told what it is."""
        self.name = launch.opening.world
        self.spec = spec or WorldSpec()
        self.abilities: frozenset[str] = frozenset()
        self._away = spec is None
        self._launch = launch
        self._site = site
        self._fleet = fleet
        self._per_process = min(per_process, fleet.parallel)
        self._workers: list[Worker] = []
        self._asked: Worker | None = None
        self._open = True
        self._added = 0

    @property
    def processes(self) -> list[int]:
        return [worker.pid for worker in self._living() if worker.pid is not None]

    async def open(self) -> None:
        opened = await self._question("open")
        self.abilities = frozenset(opened["abilities"])
        if self._away:
            self.spec = spec_from(opened["spec"], self.name)
            self._per_process = min(self.spec.per_process or 1, self._fleet.parallel)

    async def size(self, split: str) -> int:
        return await self._question("tasks", split=split)

    async def take(self, split: str, indices: Sequence[int]) -> list[Task]:
        found: list[Task] = []
        for k in range(0, len(indices), BATCH):
            batch = [*indices[k : k + BATCH]]
            found += map(task_from, await self._question("task", split=split, indices=batch))
        return found

    async def named(self, name: str) -> Task:
        return task_from(await self._question("named", name=name))

    async def answer(self, task: Task, action: str) -> str | None:
        return await self._question("answer", task=task_to(task), action=action)

    async def add(self) -> World:
        worker = next((w for w in self._living() if self._has_room(w)), None) or self._start()
        worker.instances += 1  # at once: others are asking, too
        self._added += 1
        world = RemoteWorld(worker, self._added, self)
        try:
            await self._opened(worker)
            adding = worker.ask("add", instance=world.number)
            await self._in_time(adding, f"no instance of {self.name} was made")
        except BaseException as error:
            worker.instances -= 1
            worker.tell("drop", instance=world.number)
            if isinstance(error, TimeoutError):
                raise WorldError(str(error)) from None
            raise
        return world

    async def drop(self, world: World) -> None:
        assert isinstance(world, RemoteWorld)
        worker = world.worker
        try:
            async with asyncio.timeout(GRACE_S):
                await world.close()
        except TimeoutError:
            worker.kill(
                f"a call to {self.name} hung, so its process and every instance in it was ended"
            )
        except WorldError:
            pass
        if world.worn and not worker.instances:
            await worker.stop()

    async def close(self) -> None:
        self._open = False
        every = [*self._workers, *([self._asked] if self._asked else [])]
        await asyncio.gather(*(worker.stop() for worker in every))
        await self._site.close()

    @property
    def _deadline_s(self) -> float:
        return self._fleet.start_timeout_s or self.spec.start_timeout_s

    def _has_room(self, worker: Worker) -> bool:
        limit = self.spec.recycle_after
        fresh = limit is None or worker.episodes < limit
        return fresh and worker.instances < self._per_process

    def _living(self) -> list[Worker]:
        self._workers = [worker for worker in self._workers if worker.dead is None]
        return self._workers

    def _start(self) -> Worker:
        worker = self._new()
        self._workers.append(worker)
        return worker

    def _new(self) -> Worker:
        if not self._open:
            raise WorldError(f"the worlds of {self.name} are closed; open them again")
        return self._site.start(self._launch)

    async def _question(self, what: str, **details: Any) -> Any:
        """Ask the process that never plays; ``open`` is what it was asked first.

        If it dies of something else, another one is asked.
        """
        tries = 0
        while True:
            if self._asked is None or self._asked.dead is not None:
                self._asked = self._new()
            worker, lost = self._asked, WorkerLost if what == "open" else WorldError
            try:
                opened = await self._opened(worker)
                if what == "open":
                    return opened
                asked = worker.ask(what, **details)
                limit = self._fleet.reset_timeout_s
                return (await self._in_time(asked, f"{self.name}: no {what!r}", limit))[0]
            except TimeoutError as late:
                worker.kill(str(late))
                raise WorldError(f"{late}{worker.last_words()}") from None
            except lost as error:
                tries += 1
                most = LOSSES if isinstance(error, WorkerLost) else 1
                if worker.dead is None or tries > most:
                    raise

    async def _opened(self, worker: Worker) -> Any:
        opened = asyncio.shield(worker.opened)
        try:
            return (await self._in_time(opened, f"{self.name} did not start"))[0]
        except WorkerLost:
            raise
        except WorldError as error:
            worker.kill(str(error))  # It would never be of use.
            raise
        except TimeoutError as late:
            worker.kill(str(late))
            raise WorldError(f"{worker.dead}{worker.last_words()}") from None

    async def _in_time(self, call: Awaitable[T], what: str, limit: float = 0.0) -> T:
        """Raises: TimeoutError: saying what was not there in time."""
        limit = limit or self._deadline_s
        try:
            async with asyncio.timeout(limit):
                return await call
        except TimeoutError:
            raise TimeoutError(f"{what} within {limit:g} s") from None
