"""Which tasks are played: drawn by seed, without repetition."""

import random
from collections.abc import Iterator, Sequence
from itertools import islice

from ..checked import same
from ..errors import WorldError
from ..protocols import Tasks
from ..seeds import derive
from ..types import Start, Task


class Given:
    """Tasks that are here already, as a split."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = tasks

    async def size(self) -> int:
        return len(self._tasks)

    async def take(self, indices: Sequence[int]) -> list[Task]:
        return [self._tasks[k] for k in indices]


async def draw(tasks: Tasks, count: int, seed: int) -> list[Task]:
    """``count`` tasks with distinct ids, in random order; fewer if there seem to be no more.

    Raises:
        WorldError: the split is empty, or two different tasks of those looked at share an id.
    """
    size = await tasks.size()
    if not size:
        raise WorldError("the split holds no tasks")
    rng = random.Random(seed)
    indices: Iterator[int]
    if size <= 4 * count:
        order = list(range(size))
        rng.shuffle(order)
        indices = iter(order)
    else:
        # An endless split may repeat itself: give up on it after a while.
        indices = (rng.randrange(size) for _ in range(8 * count))
    chosen: dict[str, Task] = {}
    while more := list(islice(indices, count - len(chosen))):
        for task in await tasks.take(more):
            same(chosen.setdefault(task.id, task), task)
    return list(chosen.values())


def starts(
    tasks: Sequence[Task], attempts: int, seed: int, turns: int | None = None
) -> list[Start]:
    """Each task ``attempts`` times in a row, in the same world for all of them."""
    return [
        Start(task, derive(seed, "world", task.id), attempt, turns=turns)
        for task in tasks
        for attempt in range(attempts)
    ]
