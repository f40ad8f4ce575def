"""A server in a process of its own, which goes when we go, with all that it started.

Run as a program, this file is what stands between: it starts the command it is given and ends the
whole process group as soon as its standard input closes, which the death of the parent does too.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

GRACE_S = 5.0
"""Between asking a server to end and ending it."""
SHOWN = 4000
"""Characters of a log that an error shows, at most."""


class Supervised:
    """A command that runs until it is stopped or its parent is gone; its words go to ``log``."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """Raises: OSError: it cannot be started, or the log cannot be written."""
        self.log = log
        self._swept = False
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-I", __file__, *command],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                env=dict(environment),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The process group."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        if self._process.poll() is None:
            return True
        self._sweep()
        return False

    def last_words(self, lines: int = 12) -> str:
        """The end of the log."""
        with suppress(OSError):
            text = self.log.read_bytes()[-SHOWN:].decode(errors="replace")
            return "\n".join(text.splitlines()[-lines:])
        return ""

    def errors(self, most: int = 3) -> list[str]:
        """The first errors that its log names, near its end; what follows them is mostly noise."""
        with suppress(OSError):
            text = self.log.read_bytes()[-16 * SHOWN :].decode(errors="replace")
            found = re.findall(r"\b\w*(?:Error|Exception): .+", text)
            return [line[:SHOWN] for line in dict.fromkeys(found)][:most]
        return []

    def stop(self) -> None:
        """End it, and wait until it has ended."""
        if self._process.stdin:
            with suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(GRACE_S + 2)
        except subprocess.TimeoutExpired:
            end(self._process.pid)
            self._process.wait()
        self._sweep()

    def _sweep(self) -> None:
        """End the group of what stood between, which may have died before it could do so.

        Once, as soon as its death is known: later the number may be somebody else's.
        """
        if not self._swept:
            self._swept = True
            end(self._process.pid)


def end(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def main() -> None:
    """Run the arguments until they end, or nobody holds the other end any more."""
    # Asked to end, everybody in the group ends in his own way; this process waits for them.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    read = os.dup(0)
    os.set_blocking(read, False)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    child = subprocess.Popen(sys.argv[1:], preexec_fn=_ordinary)
    while child.poll() is None:
        time.sleep(0.1)
        with suppress(BlockingIOError):
            if not os.read(read, 1):
                os.killpg(0, signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    child.wait(GRACE_S)
                break
    # Whoever is left goes too, and this process with them; why it ended, the log says.
    os.killpg(0, signal.SIGKILL)


def _ordinary() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main()
