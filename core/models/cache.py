"""Where models made on this machine are kept: each made once, and there whole or not at all."""

import os
import shutil
import socket
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psutil

from ..errors import StoreError
from ..files import DRAFT, check_writable


def cache() -> Path:
    """``$SELFWRIGHT_CACHE``, or a folder in the user's cache folder.

    Raises:
        StoreError: there is neither.
    """
    given = os.environ.get("SELFWRIGHT_CACHE")
    try:
        return Path(given) if given else Path.home() / ".cache" / "selfwright"
    except RuntimeError:
        raise StoreError("there is no home folder for models; set $SELFWRIGHT_CACHE") from None


def kept(key: str) -> Path:
    """The folder of the model that ``key`` tells from all others, made or not (``is_made``)."""
    return cache() / "models" / key


def is_made(folder: Path) -> bool:
    return (folder / "config.json").is_file()


@contextmanager
def making(folder: Path) -> Generator[Path]:
    """A folder to make a model in; if the block ends well, it is ``folder`` from then on.

    Raises:
        StoreError: nothing can be written there.
    """
    room = folder.parent
    check_writable(room, "set $SELFWRIGHT_CACHE to a folder that can be written to")
    _remove_drafts(room)
    mine = f"{DRAFT}{os.getpid()}@{socket.gethostname()}-"
    draft = Path(tempfile.mkdtemp(prefix=mine, dir=room))
    try:
        yield draft
        try:
            draft.rename(folder)
        except OSError:
            # Another process made the same model meanwhile; its content is the same.
            if not is_made(folder):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _remove_drafts(room: Path) -> None:
    """Remove what processes of this machine left half made when they were killed."""
    for draft in room.glob(f"{DRAFT}*@{socket.gethostname()}-*"):
        owner = draft.name.removeprefix(DRAFT).split("@")[0]
        if not psutil.pid_exists(int(owner)):
            shutil.rmtree(draft, ignore_errors=True)
