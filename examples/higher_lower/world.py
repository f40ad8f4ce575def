"""Guess a hidden number; the world says whether it is higher or lower."""

import json
import random
from dataclasses import dataclass

from pydantic import Field

from selfwright.core.config import Config
from selfwright.core.types import Observation, Task, TimeStep, WorldSpec

SHARES = {"train": (0, 1, 2), "validation": (3,), "test": (4,)}
"""Numbers are dealt to the splits by their remainder of 5."""


class HigherLowerConfig(Config):
    largest: int = Field(default=50, ge=5, le=10_000)
    """The hidden number lies between 1 and this."""


@dataclass(frozen=True)
class HigherLowerTask(Task):
    hidden: int


class HigherLower:
    """Every guess narrows it down; the guess that hits pays 1."""

    Config = HigherLowerConfig
    spec = WorldSpec(isolation="inline", task=HigherLowerTask)

    def __init__(self, config: HigherLowerConfig) -> None:
        self._largest = config.largest
        self._hidden, self._low, self._high = 0, 1, config.largest

    def tasks(self, split: str) -> list[HigherLowerTask]:
        instruction = f"Guess a number from 1 to {self._largest}."
        steps = self._largest.bit_length() + 1
        return [
            HigherLowerTask(f"{self._largest}:{n}", instruction, steps, n)
            for n in range(1, self._largest + 1)
            if n % 5 in SHARES[split]
        ]

    async def reset(self, task: HigherLowerTask, seed: int) -> Observation:
        self._hidden, self._low, self._high = task.hidden, 1, self._largest
        return self._seen()

    async def step(self, action: str) -> TimeStep:
        if not (action.isascii() and action.isdigit() and len(action) <= 9):
            said = Observation(f"{action[:20]!r} is no number. {self._seen().text}")
            return TimeStep(said, 0.0, terminated=False)
        guess = int(action)
        if guess == self._hidden:
            return TimeStep(Observation("Yes."), 1.0, terminated=True, success=True)
        if guess < self._hidden:
            self._low = max(self._low, guess + 1)
        else:
            self._high = min(self._high, guess - 1)
        return TimeStep(self._seen(), 0.0, terminated=False)

    async def expert(self) -> str:
        return str((self._low + self._high) // 2)

    async def random(self, seed: int) -> str:
        return str(random.Random(seed).randint(1, self._largest))

    async def snapshot(self) -> str:
        return json.dumps([self._low, self._high])

    async def restore(self, task: HigherLowerTask, snapshot: str) -> Observation:
        self._hidden, (self._low, self._high) = task.hidden, json.loads(snapshot)
        return self._seen()

    async def close(self) -> None:
        pass

    def _seen(self) -> Observation:
        return Observation(f"It is {self._low} to {self._high}.")
