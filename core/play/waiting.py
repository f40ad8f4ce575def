"""How long is waited, and how much may fail."""

import asyncio
import math
import traceback
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from ..config import Rollout
from ..errors import Late
from ..types import (
    Start,
)


class deadline:
    """``async with deadline(seconds, what)``: a timeout that says what was waited for."""

    def __init__(self, seconds: float, what: str) -> None:
        self._timeout = asyncio.timeout(seconds)
        self._seconds = seconds
        self._what = what

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *exc: object) -> bool | None:
        try:
            return await self._timeout.__aexit__(*exc)  # pyright: ignore[reportArgumentType]
        except TimeoutError:
            raise TimeoutError(f"{self._what} took longer than {self._seconds:g} s") from None


@dataclass
class Failures:
    """Counts what went wrong, until it is too much."""

    of: int
    """How many were tried."""
    allowed: float
    """The share of them that may fail."""
    error: type[Exception]
    what: str
    setting: str
    """The recipe's key that says how many may fail."""
    first: str = ""
    """The first traceback."""
    count: int = 0

    def add(self, cause: BaseException) -> None:
        """Raises: ``error``: it was one too many; holds the first traceback."""
        self.count += 1
        self.first = self.first or "".join(traceback.format_exception(cause)).rstrip()
        if self.count > self.allowed * self.of:
            raise self.error(
                f"{self.count} of {self.of} {self.what}, more than "
                f"{self.setting}={self.allowed:g} allows; the first:\n{self.first}"
            ) from None


@dataclass
class Group:
    """A task's attempts: closed when enough of them have ended, or when it is time."""

    size: int
    enough: int
    timeout_s: float | None
    ended: int = 0
    due: float | None = None
    """On the event loop's clock, known once the first has begun."""
    playing: set[asyncio.Timeout] = field(default_factory=set[asyncio.Timeout])

    @property
    def closed(self) -> bool:
        late = self.due is not None and asyncio.get_running_loop().time() >= self.due
        return late or self.ended >= self.enough

    @asynccontextmanager
    async def member(self) -> AsyncGenerator[None]:
        """While one is played. Raises: Late: it was not at its end when the group closed."""
        if self.due is None and self.timeout_s is not None:
            self.due = asyncio.get_running_loop().time() + self.timeout_s
        limit = asyncio.timeout_at(self.due)
        try:
            async with limit:
                self.playing.add(limit)
                try:
                    yield
                finally:
                    self.playing.discard(limit)
        except TimeoutError:
            if not limit.expired():
                raise
            why = f"{self.ended} of {self.size} attempts had ended well"
            if self.ended < self.enough:
                why += f" after {self.timeout_s:g} s"
            raise Late(why) from None

    def end(self) -> None:
        """One has ended well."""
        self.ended += 1
        if self.ended == self.enough:
            for limit in self.playing:
                if not limit.expired():
                    limit.reschedule(asyncio.get_running_loop().time())


PATIENT = Rollout.model_validate({})


def grouped(starts: Sequence[Start], patience: Rollout) -> list[Group]:
    """The group of each start: those of one task with one seed share it."""
    keys = [(start.task.id, start.seed) for start in starts]
    groups = {
        key: Group(size, math.ceil(patience.enough * size), patience.group_timeout_s)
        for key, size in Counter(keys).items()
    }
    return [groups[key] for key in keys]
