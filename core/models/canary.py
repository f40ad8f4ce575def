"""What a checkpoint must answer: a few tokens and how likely its learner finds them."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import StoreError
from ..files import read_json, write_json
from ..images import encoded
from ..types import Image

FILE = "canary.json"
"""In a checkpoint's folder."""
BEGIN, LENGTH = 8, 32
"""Tokens that a canary begins with, and those that are asked about."""
SIDE = 48
"""Pixels of the picture's."""


@dataclass(frozen=True)
class Canary:
    """Log-probabilities that whoever serves these weights has to agree with."""

    ids: tuple[int, ...]
    """What they begin with, then tokens that the base itself is likely to go on with."""
    logprobs: tuple[float, ...]
    """(T,) nats: of the last T ids, each given those before it."""
    pictured: bool = False
    """Whether the ids hold a placeholder, for the picture that ``shown`` makes."""

    @property
    def asked(self) -> tuple[int, ...]:
        """(T,) the ids that have log-probabilities."""
        return self.ids[-len(self.logprobs) :]

    @property
    def images(self) -> tuple[Image, ...]:
        return (shown(),) if self.pictured else ()


def write(folder: Path, canaries: Sequence[Canary]) -> None:
    plain = [{**vars(one)} for one in canaries]
    write_json(folder / FILE, {"canaries": plain})


def canaries_of(folder: Path) -> tuple[Canary, ...]:
    """Those of a checkpoint; none if it has none. Raises: StoreError: they are damaged."""
    if not (folder / FILE).is_file():
        return ()
    payload = read_json(folder / FILE)
    try:
        # Before there were pictures, there was one.
        found = tuple(_read(one) for one in payload.get("canaries", [payload]))
    except (AttributeError, KeyError, TypeError, ValueError) as cause:
        raise StoreError(f"{folder / FILE} is damaged: {cause!r}") from None
    return found


def _read(payload: Any) -> Canary:
    ids = tuple(map(int, payload["ids"]))
    logprobs = tuple(map(float, payload["logprobs"]))
    if not 0 < len(logprobs) < len(ids):
        raise ValueError(f"{len(logprobs)} log-probabilities do not go with {len(ids)} ids")
    return Canary(ids, logprobs, bool(payload.get("pictured", False)))


def usual_ids(tokenizer: Any, count: int) -> tuple[int, ...]:
    """The same ones for every model with that tokenizer; none that a template or a picture uses."""
    special = set(tokenizer.added_tokens_decoder)
    usual = [token for token in range(len(tokenizer)) if token not in special]
    return tuple(random.Random(0).choices(usual, k=count))


def shown() -> Image:
    """The picture of canaries: a slope in every colour."""
    import numpy as np

    x, y = np.meshgrid(*2 * [np.linspace(0, 255, SIDE)])
    return encoded(np.stack([x, y, 255 - (x + y) / 2], -1).astype(np.uint8))


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Mean absolute difference, nats; infinite if one is not a number, or the lengths differ."""
    if len(a) != len(b) or not a:
        return math.inf
    gap = sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)
    return gap if math.isfinite(gap) else math.inf
