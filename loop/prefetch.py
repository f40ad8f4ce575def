"""Plays iterations ahead of the one that is learned from, so that the engine never idles."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

from ..core.types import Judged

Played: TypeAlias = list[Judged]


class Prefetcher:
    """The rounds of episodes in play, by the index of their iteration."""

    def __init__(
        self, play: Callable[[int], Coroutine[Any, Any, Played]], staleness: int, end: int
    ) -> None:
        """``play``: plays an iteration's episodes. ``staleness``: how many iterations are played
        beside the one in hand. ``end``: the index after the last one."""
        self.rounds: dict[int, asyncio.Task[Played]] = {}
        self._play = play
        self._staleness = staleness
        self._end = end

    def begin(self, index: int, spent: float) -> None:
        """Play what is not in play yet: this round, and as many after it as are allowed.

        ``spent``: the budget's share that all before ``index`` have cost.
        """
        each = spent / index if index else 0.0
        for more in range(self._staleness + 1):
            number = index + more
            # None that the budget, as far as can be told, will not come to.
            if number < self._end and number not in self.rounds and spent + more * each < 1:
                self.rounds[number] = asyncio.create_task(self._play(number))

    async def end(self) -> None:
        """Whatever is still in play is given up."""
        for one in self.rounds.values():
            one.cancel()
        await asyncio.gather(*self.rounds.values(), return_exceptions=True)
