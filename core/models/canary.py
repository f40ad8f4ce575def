"""What a checkpoint must answer: a few tokens and how likely its learner finds them."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import StoreError
from ..files import read_json, write_json

FILE = "canary.json"
"""In a checkpoint's folder."""
LENGTH = 48
"""Tokens of it."""


@dataclass(frozen=True)
class Canary:
    """Log-probabilities that whoever serves these weights has to agree with."""

    ids: tuple[int, ...]
    """(T + 1,) tokens. What they say does not matter."""
    logprobs: tuple[float, ...]
    """(T,) nats: of each but the first, given those before it."""

    def write(self, folder: Path) -> None:
        write_json(folder / FILE, {"ids": self.ids, "logprobs": self.logprobs})

    @staticmethod
    def of(folder: Path) -> "Canary | None":
        """That of a checkpoint; None if it has none. Raises: StoreError: it is damaged."""
        if not (folder / FILE).is_file():
            return None
        payload = read_json(folder / FILE)
        try:
            found = Canary(tuple(map(int, payload["ids"])), tuple(map(float, payload["logprobs"])))
        except (KeyError, TypeError, ValueError) as cause:
            raise StoreError(f"{folder / FILE} is damaged: {cause!r}") from None
        if len(found.ids) != len(found.logprobs) + 1:
            raise StoreError(f"{folder / FILE} is damaged: {len(found.ids)} ids do not go with it")
        return found


def canary_ids(tokenizer: Any) -> tuple[int, ...]:
    """The same ones for every model with that tokenizer; none that a template or a picture uses."""
    special = set(tokenizer.added_tokens_decoder)
    usual = [token for token in range(len(tokenizer)) if token not in special]
    return tuple(random.Random(0).choices(usual, k=LENGTH + 1))


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Mean absolute difference, nats; infinite if one is not a number, or the lengths differ."""
    if len(a) != len(b) or not a:
        return math.inf
    gap = sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)
    return gap if math.isfinite(gap) else math.inf
