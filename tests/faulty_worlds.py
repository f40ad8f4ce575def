"""Worlds for the tests of what hosts and checks worlds; most do one thing wrong."""

import asyncio
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

from prompts import png

from selfwright.core.config import Config
from selfwright.core.images import picture
from selfwright.core.types import Observation, Task, TimeStep, WorldSpec

PICTURE = picture(png())
LEAK_BYTES = 2**20
HALF = "\ud83d"
"""Half of an emoji: a str that is no Unicode."""


class FaultyConfig(Config):
    fault: str = ""
    """What goes wrong, when the action is ``fault`` or always; empty: nothing."""
    right: str = "4"
    """The answer to the sum."""


class Faulty:
    """Say ``right`` within four steps. The observation counts steps and repeats the action."""

    Config = FaultyConfig
    spec: ClassVar[WorldSpec] = WorldSpec(isolation="inline")
    made: ClassVar[int] = 0

    def __init__(self, config: FaultyConfig) -> None:
        if config.fault == "slow start":
            time.sleep(60)
        if config.fault == "no start":
            raise RuntimeError("the licence has run out")
        if config.fault == "two only" and Faulty.made == 2:
            raise RuntimeError("there were only two")
        Faulty.made += config.fault == "two only"
        self.fault = config.fault
        self.turn = 0
        self.drawn = 0.0
        self.hoard: list[bytes] = []

    def tasks(self, split: str) -> Sequence[Task]:
        home = "everywhere" if self.fault == "shared tasks" else split
        steps = 0 if self.fault == "no steps" else 4
        tasks = [Task(f"{home} {i}", f"Say right, {i}.", steps) for i in range(40)]
        match self.fault:
            case "numbers":
                return [replace(task, id=cast(str, k)) for k, task in enumerate(tasks)]
            case "namesakes":
                return [replace(task, id=f"{home} {k % 4}") for k, task in enumerate(tasks)]
            case "half id":
                return [replace(task, id=task.id + HALF) for task in tasks]
            case "half instruction":
                return [replace(task, instruction=HALF + task.instruction) for task in tasks]
            case _:
                return tasks

    async def reset(self, task: Task, seed: int) -> Observation:
        self.turn = 0
        if self.fault == "leak":
            self.hoard.append(os.urandom(LEAK_BYTES))
        if self.fault == "narrow" and seed >= 2**32:
            raise ValueError("Seed must be between 0 and 2**32 - 1")
        drawn = random.Random() if self.fault == "moody" else random.Random(seed)
        self.drawn = drawn.random()
        actions = ("left", HALF) if self.fault == "half list" else ()
        half = HALF if self.fault == "half reset" else ""
        return Observation(f"{task.id}: {self.drawn}{half}", (PICTURE,), actions)

    async def step(self, action: str) -> TimeStep:
        self.turn += 1
        if action == "fault" or self.fault.startswith("always"):
            await self._go_wrong()
        right = action == "right"
        observation = Observation(f"{self.turn}: {action}{HALF * (self.fault == 'half step')}")
        reward = 2.0 if right and self.fault == "generous" else float(right)
        if self.fault == "rubbish" and action == "fault":
            return cast(TimeStep, {"reward": 1})
        if self.fault == "not finite" and action == "fault":
            return TimeStep(observation, float("nan"), False)
        return TimeStep(observation, reward, terminated=right, success=right)

    async def _go_wrong(self) -> None:
        match self.fault:
            case "always half words":
                raise ValueError(f"half of it: {HALF}")
            case "raise":
                raise ZeroDivisionError("the world fell off its edge")
            case "hang":
                await asyncio.sleep(60)
            case "block" | "always block":
                time.sleep(60)  # noqa: ASYNC251 - this is the fault
            case "exit":
                print("the last thing I said", file=sys.stderr)
                os._exit(7)
            case "print":
                print('{"id": 1, "value": "nonsense"}', flush=True)
            case "read":
                assert sys.stdin.read() == ""
            case _:
                pass

    async def close(self) -> None:
        pass

    async def random(self, seed: int) -> str:
        if self.fault == "pensive":
            await asyncio.sleep(60)
        if self.fault == "half random":
            return HALF
        return random.Random(seed).choice(["left", "wrong", "right"])

    async def expert(self) -> str | None:
        if self.fault == "pensive":
            await asyncio.sleep(60)
        await asyncio.sleep(0)
        if self.fault == "half expert":
            return HALF
        return "left" if self.fault == "liar" else "right"


class Apart(Faulty):
    """The same in a process of its own."""

    spec: ClassVar[WorldSpec] = WorldSpec()


class Together(Faulty):
    """Four of the same in one process."""

    spec: ClassVar[WorldSpec] = WorldSpec(per_process=4)


class Sum:
    """Attempts at a sum; without its oracle one fault still tells."""

    Config = FaultyConfig
    spec: ClassVar[WorldSpec] = WorldSpec(isolation="inline")

    def __init__(self, config: FaultyConfig, oracle: bool = True) -> None:
        self.config = config
        self.oracle = oracle
        self.turn = 0

    def tasks(self, split: str) -> Sequence[Task]:
        return [Task(f"{split} {i}", "2 + 2", 3) for i in range(40)]

    async def reset(self, task: Task, seed: int) -> Observation:
        self.turn = 0
        return Observation("go")

    async def step(self, action: str) -> TimeStep:
        self.turn += 1
        right = action == self.config.right
        said = "Yes." if right and (self.oracle or self.config.fault == "tells") else "Hm."
        ends = right and (self.oracle or self.config.fault == "ends")
        observation = Observation(f"{action}? {said}")
        reward = 0.0 if self.config.fault == "stingy" and not self.oracle else float(right)
        return TimeStep(observation, reward, ends, False, ends)

    async def close(self) -> None:
        pass

    async def expert(self) -> str | None:
        return self.config.right

    async def random(self, seed: int) -> str:
        return random.Random(seed).choice(["1", "2", "3"])

    def answer(self, task: Task, action: str) -> str | None:
        if self.config.fault == "half answer" and action == "2":
            return HALF
        return action if action.isdigit() else None

    def without_oracle(self) -> Any:
        return Sum(self.config, oracle=False)


@dataclass(frozen=True)
class Route(Task):
    """Fields of several kinds, none of which every JSON reader would keep."""

    legs: tuple[tuple[str, int], ...] = ()
    share: float = 0.5
    hint: str | None = None


class Routes:
    """Shows the task that it was given; the answer to it is its legs from the one said on."""

    Config = Config
    spec: ClassVar[WorldSpec] = WorldSpec(task=Route)

    def __init__(self, config: Config) -> None:
        pass

    def tasks(self, split: str) -> Sequence[Route]:
        return [
            Route(f"{split} {k}", "Go.", 3, (("north", k), ("söuth", -1)), k / 7, "?" * k or None)
            for k in range(3)
        ]

    async def reset(self, task: Task, seed: int) -> Observation:
        return Observation(repr(task))

    async def step(self, action: str) -> TimeStep:
        return TimeStep(Observation("on"), float(action == "1"), terminated=False)

    async def close(self) -> None:
        pass

    def answer(self, task: Route, action: str) -> str | None:
        return repr(task.legs[int(action) :]) if action.isdigit() else None

    def without_oracle(self) -> "Routes":
        return self


class Mistyped(Routes):
    """Its spec does not name the class of its tasks."""

    spec: ClassVar[WorldSpec] = WorldSpec()
