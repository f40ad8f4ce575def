"""Splits of worlds whose tasks are drawn, not listed: lazy, endless, and sharing no task."""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar, overload

T = TypeVar("T")
SHARES = (("test", 10), ("validation", 20), ("train", 100))
"""Cumulative per cent of all tasks."""


def split_of(name: str) -> str:
    """Where the task of that name belongs, whatever the settings that drew it."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % 100
    return next(split for split, below in SHARES if place < below)


class EndlessSplit(Sequence[T], Generic[T]):
    """The tasks of one split, each drawn when it is asked for."""

    def __init__(self, split: str) -> None:
        """Raises: ValueError: there is no such split."""
        if split not in dict(SHARES):
            raise ValueError(f"no split {split!r}: it is train, validation or test")
        self._split = split

    @abstractmethod
    def drawn(self, index: int) -> T:
        """The task at that place, the same whenever it is asked for."""

    def __len__(self) -> int:
        return 1 << 40

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.drawn(index)
