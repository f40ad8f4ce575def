"""What those who play see of a hosted world, and what the pool sees of who hosts it."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Protocol

from ..types import Observation, Task, TimeStep, WorldSpec


class World(Protocol):
    """A leased instance. Every answer is checked; whatever fails raises."""

    attempts: bool
    """Every action is a whole attempt at the task (``HasAttempts``)."""
    broken: bool
    """To be thrown away: discarded, or a call was cancelled half-way."""
    snapshots: bool
    """Take one after every step that does not end the episode."""
    snapshot: str
    """The last one that was taken in this episode; empty: none."""

    @property
    def gone(self) -> bool:
        """Closed, or its process has died."""
        ...

    @property
    def worn(self) -> bool:
        """Its process has played as many episodes as it may."""
        ...

    async def reset(self, task: Task, seed: int) -> Observation: ...
    async def step(self, action: str) -> TimeStep: ...
    async def expert(self) -> str | None: ...
    async def random(self, seed: int) -> str: ...
    async def restore(self, task: Task, snapshot: str) -> Observation: ...
    async def close(self) -> None: ...


class Host(Protocol):
    """Where instances live. It is asked about tasks through an instance that never plays."""

    spec: WorldSpec
    abilities: frozenset[str]

    @property
    def processes(self) -> list[int]: ...
    async def open(self) -> None: ...
    async def size(self, split: str) -> int: ...
    async def take(self, split: str, indices: Sequence[int]) -> list[Task]: ...
    async def named(self, name: str) -> Task: ...
    async def answer(self, task: Task, action: str) -> str | None: ...
    async def add(self) -> World: ...
    async def drop(self, world: World) -> None: ...
    async def close(self) -> None: ...


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
