"""A process on this machine that hosts instances of a world."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from ..errors import WorldError

GRACE_S = 2.0
"""How long a world that is thrown away may take to close."""
LAST_WORDS = 12
"""Lines of a dead process's standard error that its error message quotes."""


class LocalWorker:
    """One process, and a thread that hears what it says."""

    def __init__(self, name: str, opening: dict[str, Any]) -> None:
        self.dead: str | None = None
        self.instances = 0
        self._name = name
        self._lock = threading.Lock()
        self._pending: dict[int, Future[Any]] = {}
        self._asked = 0
        self._words: deque[str] = deque(maxlen=LAST_WORDS)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", f"{__package__}.world_process", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a group of its own, to be killed whole
        )
        self._questions: SimpleQueue[bytes | None] = SimpleQueue()
        self._overhears = threading.Thread(target=self._overhear, daemon=True)
        self._hears = threading.Thread(target=self._hear, daemon=True)
        # Of its own: a pipe to a process that hangs fills up, and whoever writes to it then waits.
        threading.Thread(target=self._speak, daemon=True).start()
        self._overhears.start()
        self._hears.start()
        self.opened: Future[list[str]] = self.call("open", path=sys.path, **opening)

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, what: str, **details: Any) -> Future[Any]:
        """Send a question; the answer, or what went wrong, comes to the future.

        Raises:
            WorldError: the process is dead.
        """
        future: Future[Any] = Future()
        with self._lock:
            if self.dead is not None:
                raise WorldError(self.dead)
            self._asked += 1
            self._pending[self._asked] = future
            question = json.dumps({"id": self._asked, "call": what, **details})
            self._questions.put(question.encode() + b"\n")
        return future

    async def ask(self, what: str, **details: Any) -> Any:
        return await asyncio.wrap_future(self.call(what, **details))

    def kill(self, reason: str) -> None:
        """End the process and all that it started; calls in progress raise ``reason``."""
        with self._lock:
            self.dead = self.dead or reason
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    async def stop(self) -> None:
        """Let the instances close, then end the process."""
        if self.dead is None:
            with suppress(TimeoutError, WorldError):
                async with asyncio.timeout(GRACE_S):
                    await self.ask("close")
        self.kill(f"the worlds of {self._name} are closed; open them again")
        await asyncio.to_thread(self._hears.join, GRACE_S)

    def last_words(self) -> str:
        return "; its last words:\n" + "\n".join(self._words) if self._words else ""

    def _speak(self) -> None:
        assert self._process.stdin
        # It has died, or was closed: the listening thread will say so.
        with suppress(OSError, ValueError):
            while (question := self._questions.get()) is not None:
                self._process.stdin.write(question)
                self._process.stdin.flush()

    def _hear(self) -> None:
        assert self._process.stdout
        # No JSON, or none of ours: treated as a death.
        with suppress(ValueError, LookupError, TypeError):
            for line in self._process.stdout:
                self._settle(json.loads(line))
        self._bury()

    def _settle(self, answer: dict[str, Any]) -> None:
        with self._lock:
            future = self._pending.pop(answer["id"], None)
        if future is None or not future.set_running_or_notify_cancel():
            return
        if "error" in answer:
            future.set_exception(raised(**answer["error"]))
        else:
            future.set_result(answer["value"])

    def _overhear(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            self._words.append(line.decode(errors="replace").rstrip())

    def _bury(self) -> None:
        """The process has closed its output: find out why, and tell whoever waits."""
        try:
            code = self._process.wait(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            code = None
        with suppress(ProcessLookupError):  # what it started may have outlived it
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._questions.put(None)
        self._overhears.join(timeout=GRACE_S)
        how = "speaking no protocol" if code is None else f"exit code {code}"
        if code is not None and code < 0:
            how = signal.Signals(-code).name
        with self._lock:
            self.dead = self.dead or f"a process of {self._name} died ({how}){self.last_words()}"
            waiting = list(self._pending.values())
            self._pending.clear()
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(WorldError(self.dead))
        # Last, and without the lock: what it started may hold the other ends, and this then waits.
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert stream
            with suppress(OSError):
                stream.close()


def told(error: BaseException) -> dict[str, str]:
    """An error, for ``raised`` in another process."""
    return {
        "kind": type(error).__name__,
        "text": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }


def raised(kind: str, text: str, traceback: str) -> WorldError:
    """An error of another process, under its own name."""
    if kind == WorldError.__name__:
        return WorldError(text)
    error = type(kind, (WorldError,), {})(text)
    error.add_note(traceback)
    return error
