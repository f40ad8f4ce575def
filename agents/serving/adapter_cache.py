"""Private copies of adapters: whoever offers one may write the next into the same folder."""

import hashlib
import shutil
import tempfile
import uuid
from pathlib import Path

from ...core.errors import DiskError
from ...core.files import DRAFT


class AdapterCache:
    """Holds them until it is closed."""

    def __init__(self) -> None:
        self._room: tempfile.TemporaryDirectory[str] | None = None
        """Made when it is needed: most servers take no adapters."""

    def keep(self, folder: Path) -> Path:
        """A copy of the folder's files, whose path is another one for other content.

        It ends as the folder's own path does, for people to know it by.

        Raises:
            DiskError: it cannot be copied.
        """
        folder = folder.resolve()
        try:
            if self._room is None:
                self._room = tempfile.TemporaryDirectory(
                    prefix="selfwright-adapters-", ignore_cleanup_errors=True
                )
            room = Path(self._room.name)
            draft = room / f"{DRAFT}{uuid.uuid4().hex}"
            draft.mkdir()
            # What counts is what was copied, whatever happens to the original meanwhile.
            kept = room / _copied(folder, draft) / folder.relative_to(folder.anchor)
            if kept.is_dir():
                shutil.rmtree(draft)
            else:
                kept.parent.mkdir(parents=True, exist_ok=True)
                draft.rename(kept)
        except OSError as error:
            message = f"cannot copy the adapter {folder.name}: {error.strerror or error}"
            raise DiskError(message) from error
        return kept

    def clear(self, but: Path | None) -> None:
        """Throw away all copies but that one, and what is half made."""
        for one in Path(self._room.name).iterdir() if self._room else ():
            if but is None or not but.is_relative_to(one):
                shutil.rmtree(one, ignore_errors=True)

    def close(self) -> None:
        if self._room is not None:
            self._room.cleanup()


def _copied(folder: Path, draft: Path) -> str:
    """Copies its files, and returns a digest of the copies."""
    found = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file():
            with Path(shutil.copyfile(file, draft / file.name)).open("rb") as copy:
                inside = hashlib.file_digest(copy, "sha256").hexdigest()
            found.update(f"{inside} {file.name}\0".encode())
    return found.hexdigest()
