"""Which prompts are read together, and how much of their beginning is read once for all of them."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

from ...core.models.prefixes import common
from .cache import PrefixCache, Read

Group: TypeAlias = tuple[list[int], int]
"""Which prompts, and how many ids they all begin with that are read once."""


def plan(prompts: Sequence[Read], memory: PrefixCache | None) -> list[Group]:
    """Conversations that memory knows, by what stands before them there, then new ones.

    What is shared depends on the prompts alone, not on what was asked before. Only a lone prompt
    looks for it in memory.
    """
    known: dict[tuple[int, ...], list[int]] = {}
    new: dict[tuple[int, ...], list[int]] = {}
    pictured: list[int] = []
    for k, (ids, images) in enumerate(prompts):
        place = memory.find((ids, images)) if memory else None
        if place is not None:
            known.setdefault(ids[: place.behind], []).append(k)
        elif images:
            pictured.append(k)
        else:
            new.setdefault(ids, []).append(k)
    groups = [(which, len(ids)) for ids, which in known.items()]
    groups += [(pictured, 0)] if pictured else []
    if len(new) == 1 and memory:
        (ids,) = new
        shared = {ids: memory.begins(ids) or common((ids, memory.last or ids[:1]))}
    else:
        shared = dict(_shared(sorted(new))[1])
    if new and memory:
        memory.last = next(reversed(new))
    beginnings: dict[tuple[int, ...], list[int]] = {}
    for ids, which in new.items():
        beginnings.setdefault(ids[: shared[ids]], []).extend(which)
    return groups + [(which, len(ids)) for ids, which in beginnings.items()]


def _shared(
    prompts: Sequence[tuple[int, ...]],
) -> tuple[int, list[tuple[tuple[int, ...], int]]]:
    """Tokens saved, and the length of each of sorted ``prompts``'s beginning.

    Prompts that begin alike are one group, unless groups of them, say those of one world each,
    have so much more in common that more than twice as much is saved.
    """
    if len(prompts) < 2:
        return 0, [(prompt, 0) for prompt in prompts]
    length = common(prompts)
    together = length * (len(prompts) - 1)
    cuts = [k for k, two in enumerate(pairwise(prompts), 1) if common(two) == length]
    bounds = [0, *cuts, len(prompts)]
    parts = [_shared(prompts[a:b]) for a, b in pairwise(bounds)] if cuts else []
    apart = sum(saved for saved, _ in parts)
    if apart > 2 * together:
        return apart, [one for _, found in parts for one in found]
    return together, [(prompt, length) for prompt in prompts]
