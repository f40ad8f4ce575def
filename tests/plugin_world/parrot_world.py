"""A world in a package of its own: say the word that is shown."""

from selfwright.core import config
from selfwright.core.types import Observation, Task, TimeStep

WORDS = {"train": ("a", "b", "c", "d"), "validation": ("e", "f"), "test": ("g", "h")}


class ParrotConfig(config.Config):
    loud: bool = False


class Parrot:
    Config = ParrotConfig
    isolation = "inline"

    def __init__(self, config: ParrotConfig) -> None:
        self._loud, self._word = config.loud, ""

    def tasks(self, split: str) -> list[Task]:
        return [Task(f"parrot {word}", f"Say {word}.", max_steps=1) for word in WORDS[split]]

    async def reset(self, task: Task, seed: int) -> Observation:
        word = task.id.removeprefix("parrot ")
        self._word = word.upper() if self._loud else word
        return Observation(self._word)

    async def step(self, action: str) -> TimeStep:
        right = action == self._word
        return TimeStep(Observation(""), float(right), terminated=True, success=right)

    async def expert(self) -> str:
        return self._word

    async def close(self) -> None:
        pass
