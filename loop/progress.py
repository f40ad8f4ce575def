"""Progress for people: a live line on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

HEARTBEAT_S = 30.0
"""Where lines are plain, a stage that lasts says so this often."""


class Progress:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._noted: set[str] = set()

    def say(self, line: str) -> None:
        """One line that stays. The text is shown as it is, never as markup."""
        self._console.print(escape(line), highlight=False)

    def note(self, text: str) -> None:
        """Say ``text``, once however often it is noted."""
        if text not in self._noted:
            self._noted.add(text)
            self.say(f"note: {text}")

    @contextmanager
    def stage(self, name: str, total: int = 0) -> Generator[Callable[[int], None]]:
        """While open, shows ``name``; call what it yields with the number done so far."""
        if self._console.is_terminal:
            with self._console.status(escape(name)) as status:
                yield lambda done: status.update(escape(_line(name, done, total)))
            return
        said = time.monotonic()

        def tell(done: int) -> None:
            nonlocal said
            if time.monotonic() - said >= HEARTBEAT_S:
                said = time.monotonic()
                self.say(_line(name, done, total))

        yield tell


def _line(name: str, done: int, total: int) -> str:
    return f"{name}: {done}/{total}" if total else f"{name}: {done}"
