"""Rows of tokens as trees: what several begin with stands once, or nearly all of it.

Rows in lexicographic order are the walk of their trie that goes deep first: of each row there is
only new what it does not have in common with the row before. A token attends to those before it on
its own way from the root, and these are the ones whose subtree it stands in. Rows without anything
in common are trees of their own, beside one another: nothing is padded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Numbers: TypeAlias = NDArray[np.int64]
STEP = 16
"""Rows part after whole multiples of so many tokens."""


@dataclass(frozen=True)
class Segment:
    """Tokens that follow one another without a branch."""

    begin: int
    end: int
    before: tuple[int, ...]
    """The segments on its way from the root, in order."""


@dataclass(frozen=True)
class Forest:
    """(T,) tokens of all rows, each once."""

    owners: Numbers
    """(T,) a row that each is of,"""
    depths: Numbers
    """(T,) and where it stands there."""
    ends: Numbers
    """(T,) where what comes behind each ends: it is seen from itself up to there."""
    places: list[Numbers]
    """Of each row, where its tokens stand."""
    segments: list[Segment]
    order: list[int]
    """The rows, as the walk comes to them,"""
    known: list[int]
    """and how many tokens of each, in that order, it has met before."""

    def __len__(self) -> int:
        return len(self.owners)

    @property
    def branches(self) -> int:
        """Segments with something behind them."""
        return sum(int(self.ends[one.end - 1]) > one.end for one in self.segments)


def common(one: Numbers, other: Numbers) -> int:
    """How many numbers both begin with."""
    shortest = min(len(one), len(other))
    unlike = one[:shortest] != other[:shortest]
    return int(unlike.argmax()) if unlike.any() else shortest


def walk(rows: Sequence[Numbers], step: int) -> tuple[list[int], list[int]]:
    """An order of the rows, and how many tokens each has in common with the one before.

    Of those, whole multiples of ``step``: rows that part everywhere would make for many short
    segments, and each has to be seen to by itself. Negative numbers stand for pictures, which are
    not cut.
    """
    order = sorted(range(len(rows)), key=lambda k: rows[k].tolist())
    known = [0] * len(rows)
    for at in range(1, len(order)):
        row = rows[order[at]]
        cut = common(rows[order[at - 1]], row) // step * step
        known[at] = _whole(row, cut)
    return order, known


def _whole(row: Numbers, cut: int) -> int:
    """The last place up to ``cut`` at which nothing is in two: equal negative numbers are one."""
    before, after = row[:cut][row[:cut] < 0], row[cut:][row[cut:] < 0]
    if len(before) and len(after) and before[-1] == after[0]:
        return int((row == before[-1]).argmax())
    return cut


def plant(rows: Sequence[Numbers], step: int = STEP) -> Forest:
    """The forest of ``rows``: of whatever tells their tokens apart."""
    order, known = walk(rows, step)
    places: list[Numbers] = [np.empty(0, np.int64)] * len(rows)
    owners, depths = np.empty((2, sum(map(len, rows))), np.int64)
    ends = np.empty_like(owners)
    parents: dict[int, int] = {}  # Of the tokens that begin a segment.
    size, before = 0, np.empty(0, np.int64)
    for k, old in zip(order, known, strict=True):
        new = len(rows[k]) - old
        ends[before[old:]] = size
        if new and old < len(before):  # The one before is cut where this one leaves it.
            parents.setdefault(int(before[old]), int(before[old - 1]) if old else -1)
        if new:
            parents[size] = int(before[old - 1]) if old else -1
        before = np.concatenate([before[:old], np.arange(size, size + new)])
        owners[size : size + new] = k
        depths[size : size + new] = np.arange(old, old + new)
        places[k] = before
        size += new
    ends[before] = size
    return Forest(
        *(owners[:size], depths[:size], ends[:size]), places, _segments(parents, size), order, known
    )


def _segments(parents: dict[int, int], size: int) -> list[Segment]:
    begins = sorted(parents)
    found: list[Segment] = []
    for begin, end in zip(begins, [*begins[1:], size], strict=True):
        parent = parents[begin]
        before: tuple[int, ...] = ()
        if parent >= 0:
            at = int(np.searchsorted(begins, parent, "right")) - 1
            before = (*found[at].before, at)
        found.append(Segment(begin, end, before))
    return found


def groves(rows: Sequence[Numbers], budget: int, step: int = STEP) -> list[list[int]]:
    """Indices of ``rows`` in groups whose forests are of at most ``budget`` tokens.

    Rows that begin alike stand together as far as there is room; what they share is computed again
    in the next group. A single row may exceed the budget.
    """
    order, known = walk(rows, step)
    groups: list[list[int]] = []
    size = 0
    for k, old in zip(order, known, strict=True):
        new = len(rows[k]) - old
        if groups and size + new <= budget:
            groups[-1].append(k)
            size += new
        else:
            groups.append([k])
            size = len(rows[k])
    return groups
