"""Files that are either whole or absent: atomic writes, and JSON that is always valid."""

import json
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

from .errors import DiskError, StoreError

DRAFT = ".draft-"
"""Names that begin so are unfinished work; whoever owns the folder may remove them."""


@contextmanager
def atomic_write(path: Path, sync: bool = True) -> Generator[IO[bytes]]:
    """A file to write to, which appears at ``path`` only if the block ends well.

    ``sync``: it is to survive a power cut from then on.

    Raises:
        StoreError: The file cannot be written, for example because the disk is full.
    """
    draft = path.with_name(f"{DRAFT}{uuid.uuid4().hex}")
    try:
        with draft.open("xb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        draft.replace(path)
        if sync:
            sync_folder(path.parent)
    except OSError as error:
        # Arrow's errors have a number, but words of its own.
        message = os.strerror(error.errno) if error.errno else str(error)
        raise DiskError(f"cannot write {path}: {message}") from error
    finally:
        with suppress(OSError):  # it is renamed if all went well
            draft.unlink()


def check_writable(folder: Path, advice: str) -> None:
    """Make ``folder``, and try to write a file in it, which is removed again.

    To be called before the work whose outcome is to lie there.

    Raises:
        StoreError: it cannot be; ``advice`` says what to do.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=DRAFT) as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StoreError(f"cannot write to {folder}: {error.strerror or error}; {advice}") from None


def read_words(path: Path) -> str:
    """The text of somebody's file, in UTF-8, its line ends as they are; without a byte-order mark.

    Raises:
        ValueError: it cannot be read, or is in another encoding.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8: {error.reason} at byte {error.start}") from error


def atomic_write_bytes(path: Path, data: bytes, sync: bool = True) -> None:
    """Write ``data`` to ``path``, replacing it in one step; the folder must exist.

    Raises:
        StoreError: The file cannot be written.
    """
    with atomic_write(path, sync) as file:
        file.write(data)


def hard_link(source: str, target: str) -> None:
    """A second name for a file that is never rewritten; a copy where there can be none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` survive a power cut."""
    sync_file(folder)


def sync_tree(folder: Path) -> None:
    """Make all files and names under ``folder`` survive a power cut."""
    for parent, _, names in os.walk(folder):
        for name in names:
            if not os.path.islink(path := Path(parent, name)):
                sync_file(path)
        sync_file(Path(parent))


def sync_file(path: Path) -> None:
    """Make its content survive a power cut. Raises: OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, obj: Any) -> None:
    """Write ``obj`` as indented UTF-8 JSON, in one step; the folder must exist.

    NaN and the infinities are refused: JSON has no word for them, and a metric that is one is a
    fault better seen here than plotted as nothing. What has no value is left out, or None.

    Raises:
        StoreError: A number is not finite (the message names its key), or the disk is full.
    """
    if bad := _not_finite(obj, ""):
        raise StoreError(f"cannot write {path}: {bad}; JSON holds finite numbers only")
    text = json.dumps(obj, allow_nan=False, ensure_ascii=False, indent=2) + "\n"
    # Half an emoji has no UTF-8; the escape Python writes for it is the one JSON reads.
    atomic_write_bytes(path, text.encode("utf-8", "backslashreplace"))


def canonical_json(obj: Any) -> str:
    """``obj`` as the one text that says it: keys sorted, no spaces, finite numbers only.

    Raises:
        ValueError: a number is not finite. TypeError: JSON has no word for a value.
    """
    return json.dumps(
        obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def _not_finite(obj: Any, key: str) -> str:
    """Which number under ``key`` is not finite; empty if all are."""
    if isinstance(obj, float) and not math.isfinite(obj):
        return f"{key or 'the value'} is {obj}"
    if isinstance(obj, Mapping):
        items = cast("Mapping[Any, Any]", obj).items()
    elif isinstance(obj, list | tuple):
        items = enumerate(cast("Sequence[Any]", obj))
    else:
        return ""
    found = (_not_finite(value, f"{key}.{name}" if key else str(name)) for name, value in items)
    return next(filter(None, found), "")


def read_json(path: Path) -> Any:
    """What ``path`` holds.

    Raises:
        StoreError: The file is missing, unreadable or not valid JSON.
    """
    try:
        return json.loads(path.read_bytes(), parse_constant=_refuse)
    except FileNotFoundError:
        raise StoreError(f"{path} is missing") from None
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is damaged: not valid JSON ({error})") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")
