"""A served agent under load: sessions at once for some minutes, latency, errors, memory.

    python benchmarks/serving.py [--minutes 5] [--sessions 64] [--vllm PYTHON]

The server is the real command, in a process of its own, with a small model made here; with --vllm
it is measured with that engine, too. Every session plays a task of three actions and begins another
when it is done, without a pause, so as many requests are in flight as there are sessions. Memory is
the resident set of the server and the processes it has started, read once the first sessions have
been played, and at the end; what it grew by in the second half of the time shows a leak. Requests
of the first seconds are counted but not timed.
"""

import argparse
import asyncio
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from selfwright.agents import scratch
from selfwright.agents.serving.client import Client
from selfwright.core.errors import PolicyError
from selfwright.core.files import write_json

RESULTS = Path(__file__).parent / "results" / "serving.json"
TURNS = 3
WARM_UP_S = 5.0
START_S = 120.0
"""Within which the server must be there."""
EVERY_S = 1.0
"""Between two looks at its memory."""


@dataclass
class Load:
    """What the clients saw."""

    until: float
    begun: float
    seconds: list[float] = field(default_factory=list[float])
    requests: int = 0
    errors: dict[str, int] = field(default_factory=dict[str, int])


async def play(client: Client, load: Load, number: int) -> None:
    """One session after another, until the time is up."""
    rng = random.Random(number)
    while time.monotonic() < load.until:
        try:
            numbers = [rng.randint(1, 9) for _ in range(3)]
            session = await client.session(f"Make {sum(numbers)} from {numbers}.", TURNS)
            for turn in range(TURNS):
                began = time.monotonic()
                await session.act(f"Wrong, try again ({turn})." if turn else "Begin.")
                load.requests += 1
                if began - load.begun > WARM_UP_S:
                    load.seconds.append(time.monotonic() - began)
            await session.end()
        except PolicyError as error:
            said = str(error).partition(" refused: ")[2][:60] or str(error)[:60]
            load.errors[said] = load.errors.get(said, 0) + 1


async def watch(process: psutil.Process, load: Load) -> list[float]:
    """Resident MiB, about once a second."""
    sizes = list[float]()
    await asyncio.sleep(WARM_UP_S)
    while time.monotonic() < load.until:
        with suppress(psutil.NoSuchProcess):
            family = (process, *process.children(recursive=True))
            sizes.append(sum(one.memory_info().rss for one in family) / 2**20)
        await asyncio.sleep(EVERY_S)
    return sizes


async def measured(url: str, pid: int, sessions: int, seconds: float) -> dict[str, Any]:
    now = time.monotonic()
    load = Load(now + seconds, now)
    async with Client(url, timeout_s=60.0) as client:
        watching = asyncio.create_task(watch(psutil.Process(pid), load))
        await asyncio.gather(*(play(client, load, k) for k in range(sessions)))
        sizes = await watching
    cuts = statistics.quantiles(load.seconds, n=100)
    half = sizes[len(sizes) // 2 :]
    return {
        "sessions": sessions,
        "seconds": seconds,
        "requests": load.requests,
        "requests_per_s": round(load.requests / seconds, 1),
        "p50_ms": round(1000 * cuts[49], 1),
        "p95_ms": round(1000 * cuts[94], 1),
        "p99_ms": round(1000 * cuts[98], 1),
        "errors": load.errors,
        "rss_start_mib": round(sizes[0], 1),
        "rss_end_mib": round(sizes[-1], 1),
        "rss_growth_second_half_mib": round(half[-1] - half[0], 1),
    }


def main() -> int:
    """0 if nothing failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--sessions", type=int, default=64, help="at once")
    parser.add_argument("--vllm", help="an interpreter that has it")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a JSON file")
    arguments = parser.parse_args()
    # Full within seconds: a bound that is not reached would pass for a leak.
    engines = {"transformers": ["-o", "policy.memory_gb=0.01"]}
    if arguments.vllm:
        engines["vllm"] = ["-o", "policy.memory_gb=0.03", "-o", f"policy.python={arguments.vllm}"]
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="selfwright-") as room:
        model = Path(room) / "model"
        texts = [f"Make {k} from [{k % 7}, {k % 5}]. Wrong, try again. Begin." for k in range(200)]
        scratch.make("scratch:64x2", texts, model, seed=0)
        for engine, more in engines.items():
            found[engine] = served(model, ["--engine", engine, *more], arguments)
            Console().print_json(data={engine: found[engine]})
    data = {
        "versions": {name: version(name) for name in ("fastapi", "torch", "uvicorn")},
        "machine": {"cores": os.cpu_count(), "platform": platform.platform()},
        **found,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output, data)
    return 1 if any(one["errors"] or one["exit_code"] for one in found.values()) else 0


def served(model: Path, more: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", "selfwright", "serve", str(model), "--port", "0"]
    command += ["-o", "policy.max_tokens=16", "--temperature", "1", *more]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables) as server:
        try:
            url = address(server)
            seconds = 60 * arguments.minutes
            told = asyncio.run(measured(url, server.pid, arguments.sessions, seconds))
            server.terminate()
            told["exit_code"] = server.wait(60)
        finally:
            server.kill()
    return told


def address(server: "subprocess.Popen[str]") -> str:
    assert server.stderr
    until = time.monotonic() + START_S
    for line in server.stderr:
        if line.startswith("serving "):
            return line.split(" at ")[1].strip().rstrip("/")
        if time.monotonic() > until:
            break
    raise SystemExit("the server did not start")


if __name__ == "__main__":
    sys.exit(main())
