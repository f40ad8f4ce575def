"""Dataclasses to Arrow columns and back, whole columns at a time.

A ``Shape`` says how values of one kind lie in an array. A row is never made into a dict: what takes
the time is the number of columns, not that of rows times fields.
"""

# pyarrow has no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from operator import attrgetter
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

FAULTS: tuple[type[Exception], ...] = (
    pa.ArrowException,
    AttributeError,
    OverflowError,
    TypeError,
    ValueError,
)
"""What ``encode`` raises for values that are not of its kind, ``decode`` for damage."""


class Shape(Protocol):
    @property
    def type(self) -> Any:
        """The Arrow type."""
        ...

    def encode(self, values: Sequence[Any]) -> Any:
        """An array of ``type``, as long as ``values``. Raises: ``FAULTS``."""
        ...

    def decode(self, array: Any) -> list[Any]:
        """What ``encode`` was given. Raises: ``FAULTS``."""
        ...


class Leaf:
    """Text, numbers and truth values; never null, never NaN."""

    def __init__(self, type: Any) -> None:
        self.type = type
        self._floating = pa.types.is_floating(type)

    def encode(self, values: Sequence[Any]) -> Any:
        array = pa.array(values, self.type)
        if array.null_count:
            raise ValueError(f"None, wanted {self.type}")
        if self._floating and np.isnan(array.to_numpy(zero_copy_only=False)).any():
            raise ValueError("NaN, wanted a number")
        return array

    def decode(self, array: Any) -> list[Any]:
        _full(array)
        if pa.types.is_string(self.type):
            return array.to_pylist()
        return array.to_numpy(zero_copy_only=False).tolist()


class Many:
    """Tuples."""

    def __init__(self, item: Shape) -> None:
        self.item = item
        self.type = pa.list_(item.type)

    def encode(self, values: Sequence[Any]) -> Any:
        # A text is a sequence, too: each letter would pass for an item.
        if wrong := set(map(type, values)) - {tuple, list}:
            raise TypeError(f"{wrong.pop().__name__}, wanted a tuple")
        ends = np.zeros(len(values) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, values), np.int64, len(values)), out=ends[1:])
        items = self.item.encode(list(chain.from_iterable(values)))
        return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), items)

    def decode(self, array: Any) -> list[Any]:
        _full(array)
        items = self.item.decode(array.flatten())
        ends = array.offsets.to_numpy()
        return [tuple(items[a:b]) for a, b in pairwise((ends - ends[0]).tolist())]


class Maybe:
    """What may be None."""

    def __init__(self, item: Shape) -> None:
        self.item = item
        self.type = item.type

    def encode(self, values: Sequence[Any]) -> Any:
        there = [value for value in values if value is not None]
        if not there:
            return pa.nulls(len(values), self.type)
        items = self.item.encode(there)
        if len(there) == len(values):
            return items
        places = iter(range(len(there)))
        taken = [None if value is None else next(places) for value in values]
        return items.take(pa.array(taken, pa.int32()))

    def decode(self, array: Any) -> list[Any]:
        if not array.null_count:
            return self.item.decode(array)
        items = iter(self.item.decode(array.drop_null()))
        return [next(items) if there else None for there in array.is_valid().to_pylist()]


class Record:
    """Objects of one class, by their fields; nested ones are structs."""

    def __init__(self, make: Callable[..., Any], **fields: Shape) -> None:
        """``fields`` are those of ``make``, in the order in which it takes them; its last ones may
        be left to their defaults."""
        self.make = make
        self.older: dict[int, Record] = {}
        """What schemas before this one had in its place."""
        self.fields = fields
        self.type = pa.struct({name: shape.type for name, shape in fields.items()})

    def columns(self, values: Sequence[Any]) -> list[Any]:
        """A list of arrays, one a field."""
        arrays: list[Any] = []
        for name, shape in self.fields.items():
            try:
                arrays.append(shape.encode(list(map(attrgetter(name), values))))
            except FAULTS as error:
                raise ValueError(f"{name}: {error}") from error
        return arrays

    def objects(self, columns: Sequence[Any]) -> list[Any]:
        decoded: list[list[Any]] = []
        for (name, shape), column in zip(self.fields.items(), columns, strict=True):
            try:
                decoded.append(shape.decode(column))
            except FAULTS as error:
                raise ValueError(f"{name}: {error}") from error
        return list(map(self.make, *decoded))

    def encode(self, values: Sequence[Any]) -> Any:
        return pa.StructArray.from_arrays(self.columns(values), fields=list(self.type))

    def decode(self, array: Any) -> list[Any]:
        _full(array)
        return self.objects([array.field(k) for k in range(len(self.fields))])

    @property
    def schema(self) -> Any:
        """Of a table of such rows, a column a field."""
        return pa.schema(list(self.type))

    def table(self, rows: Sequence[Any]) -> Any:
        return pa.Table.from_arrays(self.columns(rows), schema=self.schema)

    def rows(self, table: Any) -> list[Any]:
        return self.objects([_one(column) for column in table.columns])


def _one(column: Any) -> Any:
    """The single array that a table's column comes to."""
    whole = column.combine_chunks()
    # A column without rows has no chunk, either.
    return whole if isinstance(whole, pa.Array) else pa.concat_arrays(whole.chunks)


def _full(array: Any) -> None:
    if array.null_count:
        raise ValueError("null where there is always a value")
