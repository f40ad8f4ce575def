"""One run's folder on disk: locked while in use, committed iteration by iteration, resumable.

    recipe.json              everything the run was started with
    base/                    the model it begins with, if that was made here
    bases/phase_2/, ...      those of phases after the first: what the one before has come to
    iterations/0000/ ...     one folder per finished iteration
    evaluations/base/, final/
    images/                  every image once, by content (see ``core.store``)
    checkpoint/              what the run learned
    result.json, report.html

A folder is written under a name that begins with ``.draft-`` and renamed when it is whole: what has
its final name is finished. ``.selfwright.lock`` is held by the process that uses the folder; the
kernel lets go of it when that process ends, however it ends.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias, cast

from ..errors import DiskError, StoreError
from ..files import DRAFT, read_json, sync_folder, sync_tree, write_json

Differences: TypeAlias = Callable[[dict[str, Any], dict[str, Any]], list[str]]
"""``differences(stored, wanted)``: a line per key path that differs, with both values."""

LOCK = ".selfwright.lock"
_NAME = re.compile(r"[a-z0-9_]+(/[a-z0-9_]+)?")
_ADVICE = "use another --output, or the same recipe"

_locks: set[int] = set()


def _forget_locks() -> None:
    # A forked world process shares its parent's lock and, if it outlived it, would keep the folder.
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_forget_locks)


class RunFolder:
    """A run's folder in use. Made by ``open``; usable in ``with``, which lets go of the lock."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder = folder
        self._lock = lock

    @classmethod
    def open(cls, folder: Path, recipe: dict[str, Any], differences: Differences) -> Self:
        """Begin a run in ``folder``, or go on with the one that is there.

        Args:
            folder: Missing, empty, or the folder of a run with the same recipe (of another one, if
                that run ended before anything was committed).
            recipe: All settings, defaults included; JSON-serialisable.
            differences: Tells two recipes apart; no line means that they are the same.

        Raises:
            StoreError: The folder belongs to another recipe or to something else (it is then left
                as it was), is in use by another process, or cannot be written.
        """
        _refuse_other(folder, recipe, differences)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _lock(folder)
        except OSError as error:
            raise StoreError(f"cannot use {folder} for a run: {error.strerror}") from error
        run = cls(folder, lock)
        try:
            _refuse_other(folder, recipe, differences)  # another process may have begun meanwhile
            _remove_drafts(folder)
            if not run.begun:
                stored = dict[str, Any]()
                if run.has("recipe.json"):
                    stored = cast("dict[str, Any]", read_json(folder / "recipe.json"))
                if differences(stored, _plain(recipe)):
                    run.discard("base")  # another recipe's
                write_json(folder / "recipe.json", recipe)
        except BaseException:
            run.close()
            raise
        return run

    @property
    def finished(self) -> int:
        """How many iterations are committed.

        Raises:
            StoreError: One is missing before the last.
        """
        return len(iterations(self.folder))

    @property
    def begun(self) -> bool:
        """Whether an evaluation or an iteration is committed."""
        return _begun(self.folder)

    def path(self, name: str) -> Path:
        """Where ``name`` (``iterations/0003``, ``result.json``) lies, there or not yet."""
        return self.folder / name

    def has(self, name: str) -> bool:
        return self.path(name).exists()

    @contextmanager
    def draft(self, name: str) -> Generator[Path]:
        """An empty folder to fill, which becomes ``name`` in one step when the block ends well.

        If the block raises, the folder is removed and nothing is committed.

        Raises:
            StoreError: ``name`` is there already, or the disk failed.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name like 'checkpoint' or 'iterations/0003'")
        target = self.path(name)
        if target.exists():
            raise StoreError(f"{target} is there already; a committed folder is never rewritten")
        draft = target.with_name(DRAFT + target.name)
        with _naming(target):
            draft.parent.mkdir(exist_ok=True)
            draft.mkdir()
        try:
            yield draft
            with _naming(target):
                sync_tree(draft)
                draft.rename(target)
                sync_folder(target.parent)
                sync_folder(self.folder)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise

    def discard(self, name: str) -> None:
        """Remove a committed folder; killed meanwhile, it is a draft and no half of a whole."""
        path = self.path(name)
        if path.exists():
            draft = path.with_name(DRAFT + path.name)
            with _naming(path):
                path.rename(draft)
                shutil.rmtree(draft)

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock in _locks:
            _locks.remove(self._lock)
            os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def iteration_name(index: int) -> str:
    """``iterations/0003`` for 3."""
    return f"iterations/{index:04d}"


def iterations(folder: Path) -> list[Path]:
    """The committed iterations of the run in ``folder``, in order; needs no lock.

    Raises:
        StoreError: One is missing before the last.
    """
    found = {path.name for path in (folder / "iterations").glob("*") if path.name.isdecimal()}
    paths = [folder / iteration_name(index) for index in range(len(found))]
    for path in paths:
        if path.name not in found:
            raise StoreError(
                f"{path} is missing, though {max(found, key=int)} is there; "
                "put it back, or remove the iterations after it to run them again"
            )
    return paths


def _refuse_other(folder: Path, recipe: dict[str, Any], differences: Differences) -> None:
    """Raise unless ``folder`` is free for this recipe. Writes nothing."""
    try:
        names = set(os.listdir(folder))
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreError(f"cannot use {folder} for a run: {error.strerror}") from error
    if "recipe.json" not in names:
        if names and LOCK not in names:
            raise StoreError(
                f"{folder} is not empty and is no run folder (it has no recipe.json, but "
                f"{sorted(names)[0]!r}); nothing was touched; use another --output"
            )
        return
    if LOCK in names and not _begun(folder):
        return
    stored = read_json(folder / "recipe.json")
    if not isinstance(stored, dict):
        raise StoreError(f"{folder}/recipe.json is no recipe; {_ADVICE}")
    if lines := differences(cast("dict[str, Any]", stored), _plain(recipe)):
        raise StoreError(
            f"{folder} holds a run of another recipe; {_ADVICE}. Stored there and wanted now:\n"
            + "\n".join(f"  {line}" for line in lines)
        )


def _plain(recipe: dict[str, Any]) -> dict[str, Any]:
    """As it is read back: a tuple here equals the list it was stored as."""
    return json.loads(json.dumps(recipe))


def _begun(folder: Path) -> bool:
    """Whether an evaluation or an iteration is committed, that a recipe could be at odds with."""
    return any(
        path.is_dir() and not path.name.startswith(DRAFT)
        for part in ("evaluations", "iterations")
        for path in (folder / part).glob("*")
    )


def _lock(folder: Path) -> int:
    """The descriptor of the lock file, locked."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()}".encode())
    except BlockingIOError:
        holder = os.pread(descriptor, 64, 0).decode(errors="replace") or "another process"
        os.close(descriptor)
        raise StoreError(
            f"{folder} is in use by {holder}; wait for it to end, or use another --output"
        ) from None
    except OSError:
        os.close(descriptor)
        raise
    _locks.add(descriptor)
    return descriptor


def _remove_drafts(folder: Path) -> None:
    """Remove what a killed process left half done. Only under the lock."""
    for pattern in (f"{DRAFT}*", f"*/{DRAFT}*", f"*/*/{DRAFT}*"):
        for path in folder.glob(pattern):
            with _naming(path):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()


@contextmanager
def _naming(path: Path) -> Generator[None]:
    """Turn the operating system's errors into ours, with the path."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error.strerror or error}") from error
