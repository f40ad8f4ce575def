"""Episodes that a check plays, under deadlines, and those who choose in them."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from math import inf
from typing import TypeVar

from ...core.config import Fleet
from ...core.hosting.pool import Split
from ...core.hosting.world import World
from ...core.seeds import derive
from ...core.types import Observation, Task, TimeStep

T = TypeVar("T")

ODD_ACTIONS = ("", " ", "no such action", "do\n\nthis", "\u2603 {}[]()\"'\\", "x" * 5000)


class Broken(Exception):
    """The world does not keep the contract; the message says how."""


class TooSlow(Broken):
    """A call took longer than its deadline."""


@dataclass(frozen=True)
class Episode:
    task: Task
    seed: int
    actions: tuple[str, ...]
    first: Observation
    steps: tuple[TimeStep, ...]
    gave_up: bool
    """Whoever chose the actions knew no further one."""

    @property
    def seen(self) -> tuple[object, ...]:
        return (self.first, *self.steps)

    @property
    def success(self) -> bool:
        return bool(self.steps) and self.steps[-1].success


Chooser = Callable[[World, Observation, int], Awaitable[str | None]]
"""``chooser(world, observation, turn)``: the next action, or None."""


class Stopwatch:
    """Plays episodes under deadlines, and remembers the slowest calls."""

    def __init__(self, fleet: Fleet) -> None:
        self._limits = {"reset": fleet.reset_timeout_s, "step": fleet.step_timeout_s}
        self.slowest = {"reset": 0.0, "step": 0.0}

    async def timed(self, what: str, call: Awaitable[T]) -> T:
        begin, limit = time.perf_counter(), self._limits[what]
        try:
            async with asyncio.timeout(limit):
                result = await call
        except TimeoutError:
            raise TooSlow(f"a {what} took longer than {limit:g} s") from None
        self.slowest[what] = max(self.slowest[what], time.perf_counter() - begin)
        return result

    async def play(
        self, world: World, task: Task, seed: int, choose: Chooser, longest: float = inf
    ) -> Episode:
        first = await self.timed("reset", world.reset(task, seed))
        return await self.play_on(world, task, seed, first, choose, longest)

    async def play_on(
        self,
        world: World,
        task: Task,
        seed: int,
        first: Observation,
        choose: Chooser,
        longest: float = inf,
    ) -> Episode:
        """From what is seen ``first``."""
        actions, steps, observation, gave_up = list[str](), list[TimeStep](), first, False
        while len(steps) < min(task.max_steps, longest):
            action = await self.timed("step", choose(world, observation, len(steps)))
            if action is None:
                gave_up = True
                break
            step = await self.timed("step", world.step(action))
            actions.append(action)
            steps.append(step)
            observation = step.observation
            if step.terminated or step.truncated:
                break
        return Episode(task, seed, tuple(actions), first, tuple(steps), gave_up)


async def expert(world: World, observation: Observation, turn: int) -> str | None:
    return await world.expert()


def stranger(able: bool, seed: int) -> Chooser:
    """Acts at random, by whatever means the world offers; ``able``: it can draw actions."""

    async def choose(world: World, observation: Observation, turn: int) -> str | None:
        if observation.actions:
            return random.Random(f"{seed} {turn}").choice(observation.actions)
        if able:
            return await world.random(seeded(seed, turn))
        return ODD_ACTIONS[turn % len(ODD_ACTIONS)]

    return choose


def seeded(*parts: int) -> int:
    """A seed as wide as those of runs."""
    return derive("check", *parts)


def replay(episode: Episode, begin: int = 0) -> Chooser:
    """Acts as in that episode, from an action on."""

    async def choose(world: World, observation: Observation, turn: int) -> str | None:
        at = begin + turn
        return episode.actions[at] if at < len(episode.actions) else None

    return choose


def spread(length: int, count: int) -> list[int]:
    """Up to ``count`` indices, from the first to the last."""
    if length <= count:
        return list(range(length))
    return [place * (length - 1) // max(1, count - 1) for place in range(count)]


async def some(split: Split, count: int) -> list[Task]:
    """Up to so many of its tasks."""
    return await split.take(spread(await split.size(), count))
