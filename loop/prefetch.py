"""Plays iterations ahead of the one that is learned from, so that the engine never idles."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

from ..core.recipe import Recipe
from ..core.types import Judged
from .spending import LEAST, Costs, room

Played: TypeAlias = list[Judged]


class Prefetcher:
    """The rounds of episodes in play, by the index of their iteration."""

    def __init__(
        self,
        play: Callable[[int, Costs, float], Coroutine[Any, Any, Played]],
        recipe: Recipe,
        end: int,
    ) -> None:
        """``end``: the index after the last one.

        ``play``: plays an iteration's episodes, given what is spent before it and how many
        iterations the budget then covers.
        """
        self.rounds: dict[int, asyncio.Task[Played]] = {}
        self._play = play
        self._recipe = recipe
        self._end = end

    def begin(self, index: int, spent: Costs, each: Costs) -> None:
        """Play what is not in play yet: this round, and as many after it as the recipe allows.

        ``spent``: what all before ``index`` have cost; ``each``: what an iteration costs.
        """
        for more in range(self._recipe.rollout.max_staleness + 1):
            number, before = index + more, spent.and_more(each, more)
            share = room(before, each, self._recipe.budget)
            # None that the budget, as far as can be told, will not come to.
            if number < self._end and number not in self.rounds and share >= LEAST:
                self.rounds[number] = asyncio.create_task(self._play(number, before, share))

    async def end(self) -> None:
        """Whatever is still in play is given up."""
        for one in self.rounds.values():
            one.cancel()
        await asyncio.gather(*self.rounds.values(), return_exceptions=True)
