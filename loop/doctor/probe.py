"""What a look at the machine is, and how one is kept from harming whoever looks.

Whatever may crash, hang or weigh on this process runs in one of its own, which is killed with its
children at the probe's deadline.
"""

import asyncio
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from typing import Literal, TypeAlias

Status: TypeAlias = Literal["ok", "warning", "failed", "absent"]
STATUSES: tuple[Status, ...] = ("ok", "warning", "failed", "absent")
GRACE_S = 2.0
NMS = "operator torchvision::nms does not exist"


@dataclass(frozen=True)
class Finding:
    name: str
    """The probe's, and after a slash what of it."""
    status: Status
    found: str
    remedy: str = ""
    """Empty if all is well."""


def judged(name: str, fine: bool, found: str, remedy: str, bad: Status = "failed") -> Finding:
    return Finding(name, "ok", found) if fine else Finding(name, bad, found, remedy)


Probe: TypeAlias = Callable[[], Awaitable[Iterable[Finding]]]


async def in_thread(look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """A thread of its own, no pool's: at the end nobody waits for one that hangs."""
    future: Future[list[Finding]] = Future()

    def work() -> None:
        with suppress(InvalidStateError):  # it was given up meanwhile
            try:
                future.set_result(list(look()))
            except Exception as error:
                future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return await asyncio.wrap_future(future)


LEASH = """\
import os, sys
if sys.platform == "linux":
    import ctypes, signal
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, which outlives exec
os.execv(sys.argv[1], sys.argv[1:])
"""


async def ran(*command: str) -> tuple[int, str, str]:
    """Exit code, output and error output.

    However this ends, so do the process and its children, and what they wrote for a while goes.
    """
    pipe = asyncio.subprocess.PIPE
    # Offline, and without the folder we happen to stand in: no name in it hides a package's.
    quiet = {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="selfwright-", ignore_cleanup_errors=True) as room:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-c", LEASH, *command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            env={**os.environ, **quiet, "TMPDIR": room},
            start_new_session=True,
        )
        try:
            out, err = await process.communicate()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), GRACE_S)
    return process.returncode or 0, out.decode(errors="replace"), err.decode(errors="replace")


def last_line(text: str) -> str:
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["it said nothing"])[-1]


def ending(code: int, err: str) -> str:
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"{how}: {last_line(err)}"


def remedy_for(err: str) -> str:
    if NMS in err:
        return "its torchvision does not fit its torch, and nothing needs it: pip uninstall it"
    return "install again what the message names, in the versions of constraints.txt"


def version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
