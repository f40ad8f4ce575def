"""Instances in this very process, for worlds that never block."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ..checked import (
    checked_action,
    checked_answer,
    checked_expert,
    checked_task,
    readable,
    shown,
)
from ..errors import WorldError
from ..tasks import own_task
from ..types import Observation, Task, TimeStep, WorldSpec
from .far_end import Tasks, done, offered
from .far_end import WorldError as Unsendable
from .spec import abilities_of, has_attempts
from .wire import read_observation, read_time_step, task_from, task_to
from .worker import GRACE_S
from .world import World, call_to


class InlineWorld:
    """An instance."""

    def __init__(self, host: "InlineHost", instance: Any) -> None:
        self.instance = instance
        self.attempts = has_attempts(host.abilities)
        self.broken = False
        self.gone = False
        self.worn = False
        self.snapshots = False
        self.snapshot = ""
        self._host = host
        self._name = host.name
        self._task: Any = None

    async def reset(self, task: Task, seed: int) -> Observation:
        self.snapshot = ""
        self._task = self._host.own(task)
        with call_to(self):
            return read_observation(await done(self.instance.reset(self._task, seed)), self._name)

    async def step(self, action: str) -> TimeStep:
        with call_to(self):
            step = read_time_step(await done(self.instance.step(action)), self._name)
            if self.attempts and step.answer is None:
                answer = await done(self.instance.answer(self._task, action))
                step = replace(step, answer=checked_answer(answer, self._name) or "")
            if self.snapshots and not (step.terminated or step.truncated):
                taken = await done(self.instance.snapshot())
                self.snapshot = checked_action(taken, self._name, "snapshot")
        return step

    async def expert(self) -> str | None:
        with call_to(self):
            return checked_expert(await self._offered("expert"), self._name)

    async def random(self, seed: int) -> str:
        with call_to(self):
            return checked_action(await self._offered("random", seed), self._name, "random")

    async def restore(self, task: Task, snapshot: str) -> Observation:
        self.snapshot = snapshot
        self._task = self._host.own(task)
        with call_to(self):
            seen = await self._offered("restore", self._task, snapshot)
            return read_observation(seen, self._name)

    async def close(self) -> None:
        self.gone = True
        await done(self.instance.close())

    async def _offered(self, method: str, *arguments: Any) -> Any:
        return await done(_method(self.instance, method, self._name)(*arguments))


class InlineHost:
    """Instances, and one more that is asked about tasks."""

    def __init__(self, name: str, plugin: type[Any], make: Callable[[], Any], spec: WorldSpec):
        self.name = name
        self.spec = spec
        self.abilities = abilities_of(plugin)
        self.processes: list[int] = []
        self._make = make
        self._asked: Any = None
        self._codec = Tasks(plugin, name)
        self._typed = isinstance(getattr(plugin, "spec", None), WorldSpec)
        """Whether its tasks are ours."""
        self._splits: dict[str, Any] = {}
        self._worlds: set[InlineWorld] = set()

    async def open(self) -> None:
        self._asked = self._make()
        self.abilities = abilities_of(type(self._asked))

    async def size(self, split: str) -> int:
        if split not in self._splits:
            tasks = await done(self._asked.tasks(split))
            if not hasattr(tasks, "__len__"):
                where = f"{self.name}: {split}"
                raise WorldError(f"{where} is {shown(tasks)}; wanted a sequence of tasks")
            self._splits[split] = tasks
        return len(self._splits[split])

    async def take(self, split: str, indices: Sequence[int]) -> list[Task]:
        await self.size(split)
        tasks = self._splits[split]
        return [self._task(tasks[k], f"{split}[{k}]") for k in indices]

    async def named(self, name: str) -> Task:
        found = await done(_method(self._asked, "named", self.name)(name))
        return self._task(found, f"named({name!r})")

    async def answer(self, task: Task, action: str) -> str | None:
        ask = _method(self._asked, "answer", self.name)
        return checked_answer(await done(ask(self.own(task), action)), self.name)

    def own(self, task: Task) -> Any:
        """``task`` as the world makes them. Raises: WorldError: it cannot be played."""
        task = readable(task)
        return (
            own_task(self.spec.task, task) if self._typed else self._codec.received(task_to(task))
        )

    async def add(self) -> World:
        world = InlineWorld(self, self._make())
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
        if self._asked is not None:
            await self.drop(InlineWorld(self, self._asked))

    def _task(self, value: Any, place: str) -> Task:
        if isinstance(value, Task):
            return checked_task(value, f"{self.name}: {place}")
        try:
            return task_from(self._codec.sent(value, place))
        except Unsendable as error:
            raise WorldError(str(error)) from None


def _method(instance: Any, method: str, world: str) -> Any:
    try:
        return offered(instance, method, world)
    except Unsendable as error:
        raise WorldError(str(error)) from None
