"""A process on this machine that hosts instances of a world, at the near end of the wire."""

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from ... import __version__
from ..errors import WorldError
from . import far_end
from .children import GUARDIAN, end
from .wire import Reply, error_from

GRACE_S = 2.0
"""How long a world that is thrown away may take to close."""
LAST_WORDS = 12
"""Lines of a dead process's standard error that its error message quotes."""
FAR_ENDS = "SELFWRIGHT_FAR_ENDS"
"""The environment variable with the folder of ``far_end.py`` and ``far_end.mjs``."""
PIPE_BYTES = 2**20
"""Room of the pipe for answers, where the system lets us choose: pictures are large."""


@dataclass(frozen=True)
class Opening:
    """What a process is told to host."""

    world: str
    """Its name, for messages."""
    target: str
    """``module:Class``; empty for a program that is the world itself."""
    config: str
    """JSON."""
    without_oracle: bool = False
    path: tuple[str, ...] = ()
    """Where else modules may lie."""


@dataclass(frozen=True)
class Launch:
    """How such a process is started: by a program, or by an interpreter."""

    opening: Opening
    python: str = ""
    """Empty: the one that runs where the process is started."""
    command: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        return [*self.command] or [self.python or sys.executable, far_end.__file__]


class Worker(Protocol):
    """A process that hosts instances."""

    instances: int
    episodes: int
    """How many it has begun."""
    opened: asyncio.Future[Reply]
    """Its result: the world's ``spec`` and ``abilities``."""

    @property
    def pid(self) -> int | None:
        """None on another machine."""
        ...

    @property
    def dead(self) -> str | None:
        """Why the process is no more."""
        ...

    async def ask(self, what: str, **details: Any) -> Reply: ...
    def tell(self, what: str, **details: Any) -> None: ...
    def kill(self, reason: str) -> None: ...
    async def stop(self) -> None: ...
    def last_words(self) -> str: ...


class LocalWorker:
    """One process, spoken to and heard by the event loop that it was started in."""

    def __init__(self, launch: Launch) -> None:
        """Raises: WorldError: its program cannot be started."""
        self.dead: str | None = None
        self.instances = 0
        self.episodes = 0
        self._name = launch.opening.world
        self._loop = asyncio.get_running_loop()
        self._pending: dict[int, asyncio.Future[Reply]] = {}
        self._asked = 0
        self._words: deque[str] = deque(maxlen=LAST_WORDS)
        self._process, self._in, self._out = _started(launch)
        GUARDIAN.watch(self._process.pid)
        self._unsent = bytearray()
        self._frames = far_end.Frames()
        self._buried = asyncio.Event()
        self._loop.add_reader(self._out, self._hear)
        self._overhears = threading.Thread(target=self._overhear, daemon=True)
        self._overhears.start()
        _, hello = self._call(
            "hello",
            protocol=far_end.PROTOCOL,
            frame_mb=far_end.FRAME_MB,
            speaks=f"selfwright {__version__}",
        )
        hello.add_done_callback(self._greeted)
        _, self.opened = self._call("open", **asdict(launch.opening))
        self.opened.add_done_callback(_noticed)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ask(self, what: str, **details: Any) -> Reply:
        """The answer. If whoever asks is cancelled, so is the call.

        Raises:
            WorldError: what went wrong in the process, or that it is dead.
        """
        number, future = self._call(what, **details)
        try:
            return await future
        except asyncio.CancelledError:
            self.tell("cancel", number=number)
            raise

    def tell(self, what: str, **details: Any) -> None:
        """The same, for whoever does not care for the answer."""
        with suppress(WorldError):
            self._call(what, **details)[1].add_done_callback(_noticed)

    def kill(self, reason: str) -> None:
        """End the process and all that it started; calls in progress raise ``reason``."""
        self.dead = self.dead or reason
        if not self._buried.is_set():
            end(self.pid)

    async def hung_up(self, limit_s: float) -> bool:
        """Say no more, and look whether it has gone by itself in that time."""
        os.close(self._in)
        self._in = -1
        with suppress(TimeoutError):
            await asyncio.wait_for(self._buried.wait(), limit_s)
        return self._buried.is_set()

    async def stop(self) -> None:
        """Let the instances close, then end the process."""
        if self.dead is None:
            with suppress(TimeoutError, WorldError):
                async with asyncio.timeout(GRACE_S):
                    await self.ask("close")
        self.kill(f"the worlds of {self._name} are closed; open them again")
        with suppress(TimeoutError):
            await asyncio.wait_for(self._buried.wait(), 2 * GRACE_S)

    def last_words(self) -> str:
        return "; its last words:\n" + "\n".join(self._words) if self._words else ""

    def _call(self, what: str, **details: Any) -> tuple[int, asyncio.Future[Reply]]:
        if self.dead is not None:
            raise WorldError(self.dead)
        self._asked += 1
        future = self._pending[self._asked] = self._loop.create_future()
        question = {"id": self._asked, "call": what, **details}
        try:
            self._unsent += far_end.pack(question)
        except far_end.WorldError as error:
            raise WorldError(f"{self._name}: {what}: {error}") from None
        self._speak()
        return self._asked, future

    def _greeted(self, hello: asyncio.Future[Reply]) -> None:
        error = None if hello.cancelled() else hello.exception()
        fault = str(error) if error else ""
        if not error and (spoken := hello.result()[0].get("protocol")) != far_end.PROTOCOL:
            fault = f"it speaks protocol {spoken!r}; wanted {far_end.PROTOCOL}"
        if fault and self.dead is None:
            self.kill(f"{self._name} cannot be spoken to: {fault}")

    def _speak(self) -> None:
        """Send what the pipe has room for; what hangs at the other end keeps nobody here."""
        try:
            while self._unsent:
                del self._unsent[: os.write(self._in, self._unsent)]
        except BlockingIOError:
            self._loop.add_writer(self._in, self._speak)
            return
        except OSError:
            self._unsent.clear()  # It has died: whoever hears will say so.
        self._loop.remove_writer(self._in)

    def _hear(self) -> None:
        try:
            data = os.read(self._out, PIPE_BYTES)
            for answer, blobs in self._frames.read(data):
                self._settle(answer, blobs)
        except BlockingIOError:
            return
        except (OSError, ValueError, LookupError, TypeError):
            data = b""  # No frames, or none of ours: treated as a death.
        if not data:
            self._loop.remove_reader(self._out)
            threading.Thread(target=self._bury, daemon=True).start()

    def _settle(self, answer: dict[str, Any], blobs: list[bytes]) -> None:
        future = self._pending.pop(answer["id"], None)
        if future is None or future.done():
            return
        if "error" in answer:
            future.set_exception(error_from(**answer["error"]))
        else:
            future.set_result((answer["value"], blobs))

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
        end(self.pid)  # what it started may have outlived it
        self._process.wait()
        GUARDIAN.forget(self.pid)
        self._overhears.join(timeout=GRACE_S)
        how = "speaking no protocol" if code is None else f"exit code {code}"
        if code is not None and code < 0:
            how = signal.Signals(-code).name
        with suppress(RuntimeError):  # The loop is no more, nor is anybody who waits.
            self._loop.call_soon_threadsafe(self._tell_all, how)

    def _tell_all(self, how: str) -> None:
        self.dead = self.dead or f"a process of {self._name} died ({how}){self.last_words()}"
        for future in self._pending.values():
            if not future.done():
                future.set_exception(WorldError(self.dead))
        self._pending.clear()
        for pipe in {self._in, self._out} - {-1}:
            self._loop.remove_writer(pipe)
            os.close(pipe)
        self._in = self._out = -1
        self._buried.set()


def _noticed(future: asyncio.Future[Reply]) -> None:
    """Whatever came of it, somebody has looked."""
    if not future.cancelled():
        future.exception()


def _started(launch: Launch) -> tuple[subprocess.Popen[bytes], int, int]:
    """The process, and our ends of its standard input and output, neither of which ever waits."""
    try:
        process = subprocess.Popen(
            launch.arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {FAR_ENDS: str(Path(far_end.__file__).parent)},
            start_new_session=True,  # a group of its own, to be killed whole
        )
    except OSError as error:
        program = launch.arguments[0]
        fault = f"{launch.opening.world} cannot be started: {program!r}: {error.strerror}"
        raise WorldError(f"{fault}; wanted a program that can be run") from None
    assert process.stdin and process.stdout
    ends = os.dup(process.stdin.fileno()), os.dup(process.stdout.fileno())
    process.stdin.close()
    process.stdout.close()
    for pipe in ends:
        os.set_blocking(pipe, False)
        if hasattr(fcntl, "F_SETPIPE_SZ"):
            with suppress(OSError):  # more than this user may have
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return process, *ends
