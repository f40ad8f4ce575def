"""The playground's worlds: opened when first asked for, played by the served agent step by step."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from ...core.errors import WorldError
from ...core.hosting.pool import Worlds
from ...core.hosting.world import World
from ...core.play.episode import executed
from ...core.play.players import PolicyPlayer
from ...core.play.waiting import deadline
from ...core.seeds import derive
from ...core.types import Action, Observation, Step, Task, TimeStep
from .limits import Refusal

Split: TypeAlias = Literal["train", "validation", "test"]
Opener: TypeAlias = Callable[[], Awaitable[Worlds]]


@dataclass
class Game:
    """One episode."""

    task: Task
    seed: int
    worlds: Worlds
    world: World
    lease: AsyncExitStack
    observation: Observation
    steps: list[Step] = field(default_factory=list[Step])
    last: TimeStep | None = None
    busy: bool = False
    used: float = 0.0

    @property
    def over(self) -> bool:
        last = self.last
        ended = last is not None and (last.terminated or last.truncated)
        return ended or len(self.steps) >= self.task.max_steps

    async def step(self, player: PolicyPlayer) -> Action:
        """The agent acts once, and the world answers."""
        if self.over:
            raise Refusal(409, "this game is over; begin another", "game_over")
        seed = derive(self.seed, self.task.id, len(self.steps))
        action = await player.answer(self.task, self.steps, self.observation, seed)
        try:
            async with deadline(self.worlds.fleet.step_timeout_s, "the world's step"):
                self.last = await executed(self.world, self.observation, action)
        except Exception as cause:
            self.worlds.discard(self.world)
            raise failed(cause) from cause
        self.steps.append(Step(self.observation, action, self.last.reward, self.last.answer))
        self.observation = self.last.observation
        return action


class Arena:
    """Worlds by name."""

    def __init__(self, openers: Mapping[str, Opener]) -> None:
        self._openers = openers
        self._open: dict[str, Worlds] = {}
        self._opening = asyncio.Lock()

    @property
    def names(self) -> list[str]:
        return list(self._openers)

    async def worlds(self, name: str) -> Worlds:
        """Raises: Refusal: none of that name is on this playground."""
        if name not in self._openers:
            message = f"there is no world {name!r} here; there is {', '.join(self.names) or 'none'}"
            raise Refusal(404, message, "no_world", "world")
        async with self._opening:
            if name not in self._open:
                self._open[name] = await self._openers[name]()
        return self._open[name]

    async def tasks(
        self, name: str, split: Split, begin: int, count: int
    ) -> tuple[int, list[Task]]:
        """How many there are, and some of them."""
        every = (await self.worlds(name)).tasks(split)
        size = await every.size()
        return size, await every.take(range(begin, min(begin + count, size)))

    async def begin(self, name: str, split: Split, index: int, seed: int) -> Game:
        worlds = await self.worlds(name)
        size, found = await self.tasks(name, split, index, 1)
        if not found:
            message = f"{split} has {size} tasks, no {index}"
            raise Refusal(404, message, "no_task", "index")
        lease = AsyncExitStack()
        limit = worlds.fleet.reset_timeout_s
        async with deadline(limit, "a free instance of the world"):
            world = await lease.enter_async_context(worlds.lease())
        try:
            async with deadline(limit, "the world's reset"):
                seen = await world.reset(found[0], derive(seed, "world", found[0].id))
        except BaseException as cause:
            worlds.discard(world)
            await lease.aclose()
            raise failed(cause) from cause
        return Game(found[0], seed, worlds, world, lease, seen)

    async def close(self) -> None:
        for worlds in self._open.values():
            await worlds.close()


def failed(cause: BaseException) -> BaseException:
    """A world may raise anything; what is no fault of its own stays as it is."""
    if isinstance(cause, WorldError) or not isinstance(cause, Exception):
        return cause
    return WorldError(f"{type(cause).__name__}: {cause}")
