"""Which tasks are played: drawn by seed, without repetition."""

import random
from collections.abc import Sequence

from ..checked import same
from ..errors import WorldError
from ..seeds import derive
from ..types import Start, Task


def draw(tasks: Sequence[Task], count: int, seed: int) -> list[Task]:
    """``count`` tasks with distinct ids, in random order; fewer if there seem to be no more.

    Raises:
        WorldError: the split is empty, or two different tasks of those looked at share an id.
    """
    if not len(tasks):
        raise WorldError("the split holds no tasks")
    rng = random.Random(seed)
    if len(tasks) <= 4 * count:
        order = list(range(len(tasks)))
        rng.shuffle(order)
        indices = iter(order)
    else:
        # An endless split may repeat itself: give up on it after a while.
        indices = (rng.randrange(len(tasks)) for _ in range(8 * count))
    chosen: dict[str, Task] = {}
    for index in indices:
        task = tasks[index]
        same(chosen.setdefault(task.id, task), task)
        if len(chosen) == count:
            break
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
