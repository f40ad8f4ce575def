"""Conversations that a server keeps for a while: each is one task, and what was done about it."""

import secrets
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from ...core.types import Observation, Step, Task
from .limits import Limits, Refusal


class Kept(Protocol):
    """What a ``Keeper`` keeps."""

    busy: bool
    used: float
    """When it was last of use, by the keeper's clock."""


K = TypeVar("K", bound=Kept)


class Keeper(Generic[K]):
    """At most so many of one kind, by an unguessable id, each until nobody uses it any more."""

    def __init__(
        self,
        what: str,
        most: int,
        idle_s: float,
        clock: Callable[[], float],
        left: Callable[[K], None],
    ) -> None:
        """``left`` is told of each that ends, however it ends."""
        self._what = what
        self._most = most
        self._idle_s = idle_s
        self._clock = clock
        self._left = left
        self._kept: dict[str, K] = {}

    def __len__(self) -> int:
        self.sweep()
        return len(self._kept)

    def check_room(self) -> None:
        """Raises: Refusal: there is none."""
        if len(self) >= self._most:
            oldest = min(one.used for one in self._kept.values()) if self._kept else 0.0
            wait = max(1, min(60, int(oldest + self._idle_s - self._clock())))
            message = f"{self._most} {self._what}s are open, which is the most; close one, or wait"
            raise Refusal(429, message, f"too_many_{self._what}s", retry_s=wait)

    def add(self, one: K) -> str:
        """Its id. Raises: Refusal: there is no room."""
        self.check_room()
        one.used = self._clock()
        name = secrets.token_urlsafe(16)
        self._kept[name] = one
        return name

    @contextmanager
    def using(self, name: str) -> Generator[K]:
        """The one of that id, for oneself.

        Raises:
            Refusal: there is none, or somebody else is using it.
        """
        one = self._found(name)
        one.busy = True
        try:
            yield one
        finally:
            one.busy = False
            one.used = self._clock()

    def remove(self, name: str) -> K:
        one = self._found(name)
        del self._kept[name]
        self._left(one)
        return one

    def drop(self, one: K) -> None:
        """Remove one that is being used, and has come to an end; nothing if it is gone."""
        for name in [name for name, other in self._kept.items() if other is one]:
            del self._kept[name]
            self._left(one)

    def clear(self) -> None:
        for one in self._kept.values():
            self._left(one)
        self._kept.clear()

    def _found(self, name: str) -> K:
        self.sweep()
        one = self._kept.get(name)
        if one is None:
            message = f"there is no such {self._what}; it may have ended, or was idle for too long"
            raise Refusal(404, message, f"no_{self._what}")
        if one.busy:
            message = f"this {self._what} is busy with an earlier request; one at a time"
            raise Refusal(409, message, f"{self._what}_busy")
        return one

    def sweep(self) -> None:
        """Each that was idle for too long ends."""
        before = self._clock() - self._idle_s
        for name in [n for n, one in self._kept.items() if not one.busy and one.used < before]:
            self._left(self._kept.pop(name))


@dataclass
class SessionState:
    """A task that somebody else's world sets; their steps so far."""

    task: Task
    seed: int
    steps: list[Step] = field(default_factory=list[Step])
    size: int = 0
    """Bytes of what it was shown."""
    busy: bool = False
    used: float = 0.0

    def check(self, observation: Observation, limits: Limits) -> int:
        """The session's size with the observation. Raises: Refusal: it may not be acted on."""
        if len(self.steps) >= self.task.max_steps:
            message = f"this session's {self.task.max_steps} actions are used up; open another"
            raise Refusal(409, message, "session_over")
        parts = (observation.text, *observation.actions)
        size = self.size + sum(map(len, parts)) + sum(len(i.png) for i in observation.images)
        if size > limits.history_mb * 1e6:
            message = f"this session was shown more than {limits.history_mb:g} MB; open another"
            raise Refusal(413, message, "session_too_large")
        return size
