"""Parquet files with our metadata: whole or absent, and checked when they are read."""

# pyarrow has no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import StoreError
from ..files import atomic_write, canonical_json
from .shapes import Record

VERSION = 5
_KEY = b"selfwright"
_DAMAGE: tuple[type[Exception], ...] = (OSError, ValueError, pa.ArrowException)


@contextmanager
def writing(path: Path, schema: Any, metadata: Mapping[str, Any]) -> Generator[Any]:
    """A ``ParquetWriter``, whose file is at ``path`` only if the block ends well.

    Raises:
        StoreError: ``metadata`` is not for JSON. DiskError: the file cannot be written.
    """
    try:
        header = {_KEY: canonical_json({"schema": VERSION} | dict(metadata)).encode()}
    except (TypeError, ValueError) as error:
        raise StoreError(f"cannot write {path}: its metadata, {error}") from error
    # Arrow gets the name, not the file: its threads would call Python while the interpreter ends.
    with (
        atomic_write(path) as file,
        pq.ParquetWriter(
            file.name, schema.with_metadata(header), compression="zstd", write_page_checksum=True
        ) as writer,
    ):
        yield writer


@dataclass(frozen=True, slots=True)
class Reader:
    """An open file."""

    path: Path
    file: Any
    metadata: Mapping[str, Any]

    def group(self, number: int, columns: list[str] | None = None) -> Any:
        """That row group, its pages checked.

        Raises:
            StoreError: they are damaged.
        """
        try:
            return self.file.read_row_group(number, columns=columns)
        except _DAMAGE as error:
            raise damaged(self.path, error) from error

    @property
    def sizes(self) -> list[int]:
        """How many rows each group has."""
        about = self.file.metadata
        return [about.row_group(k).num_rows for k in range(about.num_row_groups)]

    @property
    def groups(self) -> range:
        return range(self.file.metadata.num_row_groups)

    def shape(self, wanted: Record) -> Record:
        """What ``wanted`` is in this file's version.

        Raises:
            StoreError: none, or the columns are not those.
        """
        known = {VERSION: wanted} | wanted.older
        if self.version not in known:
            raise other_version(self)
        if not self.file.schema_arrow.equals(known[self.version].schema):
            raise damaged(self.path, "its columns are not those of its schema version")
        return known[self.version]

    @property
    def version(self) -> Any:
        return self.metadata.get("schema")


@contextmanager
def reading(path: Path, shape: Record | None = None) -> Generator[Reader]:
    """Open a file of ours; with ``shape``, one of those columns, or what they were before.

    Raises:
        StoreError: it is missing, damaged, or of another version.
    """
    try:
        file = pq.ParquetFile(str(path.absolute()), page_checksum_verification=True)
    except FileNotFoundError:
        raise StoreError(f"{path} is missing") from None
    except _DAMAGE as error:
        raise damaged(path, error) from error
    with file:
        try:
            payload: Any = json.loads((file.schema_arrow.metadata or {}).get(_KEY, b"{}"))
        except ValueError as error:
            raise damaged(path, error) from error
        metadata = cast("dict[str, Any]", payload) if isinstance(payload, dict) else {}
        reader = Reader(path, file, metadata)
        if shape:
            reader.shape(shape)
        yield reader


def read_rows(path: Path, shape: Record) -> tuple[list[Any], Mapping[str, Any]]:
    """All rows and the metadata of a file of this version.

    Raises:
        StoreError: as ``reading``.
    """
    with reading(path, shape) as reader:
        rows = [row for k in reader.groups for row in decoded(reader, shape, reader.group(k))]
        return rows, reader.metadata


def decoded(reader: Reader, shape: Record, table: Any) -> list[Any]:
    """Raises: StoreError: the rows are not what ``shape`` makes."""
    try:
        return reader.shape(shape).rows(table)
    except (*_DAMAGE, TypeError) as error:
        raise damaged(reader.path, error) from error


def damaged(path: Path, why: object) -> StoreError:
    return StoreError(f"{path} is damaged or is no file of ours: {why}")


def other_version(reader: Reader) -> StoreError:
    return StoreError(
        f"{reader.path} has schema version {reader.version}, "
        f"but this version of selfwright reads 2 to {VERSION}"
    )
