"""Pictures by their content: in files, each once; memory holds only those that were read last.

Whoever has an ``Image`` can have its bytes, in any part of the program: content names them, so it
does not matter which run, world or client they came from. They are written where the block of
``STORE.kept_in`` that was entered last says, or to a folder of this process's own that goes with
it, and are found there or in any folder that ``STORE.look_in`` was told of.
"""

import atexit
import hashlib
import io
import shutil
import struct
import tempfile
import threading
import uuid
from collections import OrderedDict
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from .errors import DiskError, StoreError
from .files import DRAFT, atomic_write_bytes, hard_link, sync_file, sync_folder
from .types import Image

FOLDER = "images"
"""What a run's folder of pictures is called, in the run's."""
REMEMBERED = 1 << 25
"""Bytes of pictures that were read last and are held."""
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def picture(png: bytes) -> Image:
    """A PNG file, as worlds show and clients send it.

    Raises:
        ValueError: it does not begin as one.
    """
    if not png.startswith(SIGNATURE) or png[12:16] != b"IHDR" or len(png) < 33:
        raise ValueError(f"wanted a PNG file, got {len(png)} bytes that begin {png[:8]!r}")
    width, height = struct.unpack(">II", png[16:24])
    return Image(hashlib.sha256(png).hexdigest(), width, height, png)


def encoded(pixels: Any) -> Image:
    """(H, W, 3) uint8 as a picture."""
    from PIL import Image as Pillow

    file = io.BytesIO()
    Pillow.fromarray(pixels).save(file, "PNG")
    return picture(file.getvalue())


class ImageStore:
    """Pictures in folders; usable from several threads."""

    def __init__(self) -> None:
        self._write: list[Path] = []
        self._look: dict[Path, None] = {}
        self._held: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0
        self._synced: set[Path] = set()
        self._lock = threading.Lock()

    def keep(self, image: Image) -> Image:
        """``image`` without its bytes, which are in the store from then on.

        Raises:
            DiskError: they cannot be written.
        """
        if not image.png:
            return image
        path = place(self._folder(), image)
        if _size(path) != len(image.png):  # Not there, or not whole after a power cut.
            _make(path.parent)
            # Not synced: most are seen once and forgotten. What is stored is synced by ``save``.
            atomic_write_bytes(path, image.png, sync=False)
        self._hold(image.sha256, image.png)
        return replace(image, png=b"")

    def read(self, image: Image) -> bytes:
        """The PNG file.

        Raises:
            StoreError: it is in none of the folders, or is damaged.
        """
        if image.png:
            return image.png
        with self._lock:
            if (held := self._held.get(image.sha256)) is not None:
                self._held.move_to_end(image.sha256)
                return held
        _, png = self._found(image)
        self._hold(image.sha256, png)
        return png

    def save(self, images: Iterable[Image], folder: Path) -> None:
        """Have them in ``folder`` even after a power cut.

        Raises:
            StoreError: one is nowhere, or damaged. DiskError: the disk is full.
        """
        parents: set[Path] = set()
        for image in dict.fromkeys(images):
            path = place(folder, image)
            if path in self._synced:
                continue
            if not _holds(path, image):
                source, png = (None, image.png) if image.png else self._found(image)
                _make(path.parent)
                if source is None:
                    atomic_write_bytes(path, png, sync=False)
                else:
                    _copy(source, path)
            try:
                sync_file(path)
            except OSError as error:
                raise DiskError(f"cannot write {path}: {error.strerror}") from error
            self._synced.add(path)
            parents.add(path.parent)
        for parent in parents:
            sync_folder(parent)
        if parents:
            sync_folder(folder)

    def look_in(self, folder: Path) -> None:
        """There may be pictures in this folder, too."""
        self._look[folder.absolute()] = None

    @contextmanager
    def kept_in(self, folder: Path) -> Generator[None]:
        """New pictures are written there while the block runs."""
        self._write.append(folder.absolute())
        self.look_in(folder)
        try:
            yield
        finally:
            self._write.remove(folder.absolute())

    def _folder(self) -> Path:
        with self._lock:
            if not self._write:
                folder = Path(tempfile.mkdtemp(prefix="selfwright-images-"))
                atexit.register(shutil.rmtree, folder, ignore_errors=True)
                self._write.append(folder)
                self.look_in(folder)
            return self._write[-1]

    def _found(self, image: Image) -> tuple[Path, bytes]:
        """A whole file of it, and what it holds."""
        folders = [*self._look]  # Other threads may add to them.
        fault = ""
        for folder in reversed(folders):
            path = place(folder, image)
            try:
                png = path.read_bytes()
            except FileNotFoundError:
                continue
            except OSError as error:
                fault = fault or f"cannot read the image {path}: {error.strerror}"
                continue
            if hashlib.sha256(png).hexdigest() == image.sha256:
                return path, png
            fault = fault or f"the image {path} is damaged: its content is not what it was"
        looked = ", ".join(map(str, folders)) or "nowhere, for no folder is known"
        raise StoreError(fault or f"the image {image.sha256} is missing; looked in {looked}")

    def _hold(self, name: str, png: bytes) -> None:
        with self._lock:
            if name not in self._held:
                self._held[name] = png
                self._bytes += len(png)
            while self._bytes > REMEMBERED:
                self._bytes -= len(self._held.popitem(last=False)[1])


def place(folder: Path, image: Image) -> Path:
    """Where a picture lies, there or not."""
    return folder / image.sha256[:2] / f"{image.sha256}.png"


def _size(path: Path) -> int:
    """In bytes; -1 if it is not there."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _holds(path: Path, image: Image) -> bool:
    """Whether that very picture is there, whole."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == image.sha256
    except OSError:
        return False


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"cannot write {folder}: {error.strerror}") from error


def _copy(source: Path, target: Path) -> None:
    draft = target.with_name(f"{DRAFT}{uuid.uuid4().hex}")
    try:
        hard_link(str(source), str(draft))
        draft.replace(target)
    except OSError as error:
        raise DiskError(f"cannot write {target}: {error.strerror}") from error
    finally:
        with suppress(OSError):  # it is renamed if all went well
            draft.unlink()


STORE = ImageStore()
"""This process's."""
