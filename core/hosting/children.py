"""Processes that go when we go: a guardian ends their groups once this process is no more.

Run as a program, this file is the guardian: it reads which groups to watch, a line each, and when
its standard input ends, which the death of its parent brings about, however that died, it ends
them. It needs nothing but the standard library.
"""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress


class Guardian:
    """One for all children of this process, started with the first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._groups: set[int] = set()

    def watch(self, group: int) -> None:
        """End that process group when this process has ended."""
        with self._lock:
            self._groups.add(group)
            if self._process is None or self._process.poll() is not None:
                self._start()
            else:
                self._say(f"+{group}\n")

    def forget(self, group: int) -> None:
        """It has ended: its number may soon be somebody else's."""
        with self._lock:
            self._groups.discard(group)
            self._say(f"-{group}\n")

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # What interrupts us is not meant for it.
        )
        for group in self._groups:
            self._say(f"+{group}\n")

    def _say(self, line: str) -> None:
        if self._process and self._process.stdin:
            with suppress(OSError):  # It has died; the next to be watched starts another.
                os.write(self._process.stdin.fileno(), line.encode())

    def abandon(self) -> None:
        """In a copy of this process: the children are its parent's, and so is their guardian."""
        if self._process and self._process.stdin:
            with suppress(OSError):
                os.close(self._process.stdin.fileno())
        self._lock = threading.Lock()
        self._process = None
        self._groups = set()


GUARDIAN = Guardian()
"""This process's."""
os.register_at_fork(after_in_child=GUARDIAN.abandon)


def end(group: int) -> None:
    """End a process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def main() -> None:
    """Watch until nobody holds the other end any more."""
    groups: set[int] = set()
    for line in sys.stdin:
        group = int(line[1:])
        if line[0] == "+":
            groups.add(group)
        else:
            groups.discard(group)
    for group in groups:
        end(group)


if __name__ == "__main__":
    main()
