"""A world of which some tasks raise, some hang and some answer with rubbish; the rest is easy."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any, ClassVar, cast

from selfwright.core.config import Config
from selfwright.core.types import Observation, Task, TimeStep


class FlakyConfig(Config):
    blocking: bool = False
    """Hang by blocking, not by waiting."""
    broken: int = 3
    """Of four tasks, so many go wrong, each in its own way."""


class Flaky:
    Config = FlakyConfig
    isolation: ClassVar[str] = "process"

    def __init__(self, config: FlakyConfig) -> None:
        self._config = config
        self._number = 0

    def tasks(self, split: str) -> Sequence[Task]:
        return [Task(f"{split} {k}", f"Say anything, {k}.", 2) for k in range(40)]

    async def reset(self, task: Task, seed: int) -> Observation:
        self._number = int(task.id.split()[1])
        return Observation("go on")

    async def step(self, action: str) -> TimeStep:
        fault = self._number % 4
        if fault < self._config.broken:
            if fault == 0:
                raise KeyError("the door is missing")
            if fault == 1:
                if self._config.blocking:
                    time.sleep(3600)  # noqa: ASYNC251
                await asyncio.sleep(3600)
            return cast(Any, "a string is no time step")
        return TimeStep(Observation("done"), 1.0, terminated=True, success=True)

    async def close(self) -> None:
        pass
