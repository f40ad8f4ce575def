"""Kills a run again and again and compares what it becomes with the same run left alone.

    python benchmarks/recovery.py --recipe quickstart --kills 10 --output runs/recovery

The run is made once in ``OUTPUT/whole``. Then a run in ``OUTPUT/killed-0`` gets ``kill -9``, its
whole process group at once, at moments drawn uniformly over the time the first one took, and is
started again with the same command each time. Kills that come too late, because the run has already
ended, are spent on ``killed-1`` and so on. All but times and paths must be the same.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from selfwright.core.files import DRAFT, read_json, write_json
from selfwright.core.store import read_trajectories
from selfwright.core.store.folder import iterations

RESULTS = Path(__file__).parent / "results" / "recovery.json"
SELFWRIGHT = [str(Path(sys.executable).with_name("selfwright"))]
LIMIT_S = 24 * 3600
ROUNDS = 10
"""The most run folders to spend the kills on."""


@dataclass
class Killed:
    """One run folder that was killed, and how it differs from the whole one."""

    kills_s: list[float] = field(default_factory=list[float])
    """When each kill came, in seconds since the first start."""
    wall_s: float = 0.0
    faults: list[str] = field(default_factory=list[str])


def main() -> int:
    """0 if nothing differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", required=True, help="a recipe's name or file")
    parser.add_argument("-o", dest="overrides", action="append", default=[], help="key.path=value")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    arguments = parser.parse_args()
    output: Path = arguments.output
    output.mkdir(parents=True)
    command = [*SELFWRIGHT, "run", arguments.recipe]
    for override in cast("list[str]", arguments.overrides):
        command += ["-o", override]

    start = time.monotonic()
    if not play(command, output / "whole", LIMIT_S):
        raise RuntimeError(f"the run took over {LIMIT_S} s; see {output / 'whole.log'}")
    wall_s = time.monotonic() - start
    dice = random.Random(arguments.seed)
    runs: list[Killed] = []
    missing = int(arguments.kills)
    while missing > 0 and len(runs) < ROUNDS:
        moments = sorted(dice.uniform(0, wall_s) for _ in range(missing))
        folder = output / f"killed-{len(runs)}"
        runs.append(interrupted(command, folder, moments, wall_s))
        runs[-1].faults = compare(output / "whole", folder)
        missing -= len(runs[-1].kills_s)

    ok = missing == 0 and not any(run.faults for run in runs)
    report(output / "whole", arguments.recipe, wall_s, runs, ok)
    return 0 if ok else 1


def play(command: list[str], folder: Path, limit_s: float) -> bool:
    """Run ``command`` into ``folder``: True if it ended well, False if it was killed at the limit.

    Raises:
        RuntimeError: It failed.
    """
    log = folder.with_suffix(".log")
    with log.open("ab") as file:
        process = subprocess.Popen(
            [*command, "--output", str(folder)], stdout=file, stderr=file, start_new_session=True
        )
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return False
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(30)
    if status:
        tail = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(command)} ended with status {status}:\n{tail}")
    return True


def interrupted(
    command: list[str], folder: Path, moments: Sequence[float], wall_s: float
) -> Killed:
    """Run to the end in ``folder``, killed at ``moments`` (seconds since the first start)."""
    killed = Killed()
    start = time.monotonic()
    done = False
    for moment in moments:
        done = play(command, folder, max(0.0, moment - (time.monotonic() - start)))
        if done:
            break
        killed.kills_s.append(round(time.monotonic() - start, 3))
    limit_s = 5 * wall_s + 300
    if not done and not play(command, folder, limit_s):
        raise RuntimeError(f"the last resume of {folder} took over {limit_s:.0f} s")
    killed.wall_s = round(time.monotonic() - start, 3)
    return killed


def compare(whole: Path, killed: Path) -> list[str]:
    """What differs between two finished runs, a line each."""
    faults = different("result.json", result(whole), result(killed))
    counts = len(iterations(whole)), len(iterations(killed))
    if counts[0] != counts[1]:
        faults.append(f"{counts[1]} iterations instead of {counts[0]}")
    for there, here in zip(iterations(whole), iterations(killed), strict=False):
        metrics = (timeless(read_json(folder / "metrics.json")) for folder in (there, here))
        faults += different(f"{there.name}/metrics.json", *metrics)
        wanted, got = episodes(there), episodes(here)
        for what, kept in (("lost", wanted - got), ("doubled or new", got - wanted)):
            if kept:
                faults.append(
                    f"{there.name}: {kept.total()} episodes {what}, as {next(iter(kept))}"
                )
    faults += [f"left over: {path}" for path in killed.rglob(f"{DRAFT}*")]
    return faults


def result(folder: Path) -> Any:
    """A run's result without times, and without the name of its folder."""
    text = json.dumps(timeless(read_json(folder / "result.json")))
    for name in (str(folder.absolute()), str(folder)):
        text = text.replace(json.dumps(name)[1:-1], "RUN")
    return json.loads(text)


def timeless(value: Any) -> Any:
    """``value`` without the keys that depend on the clock: seconds, rates, ``time/...``."""
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value).items()
        return {
            key: timeless(kept)
            for key, kept in items
            if not key.endswith("_s") and not key.startswith("time/")
        }
    if isinstance(value, list):
        return [timeless(kept) for kept in cast("list[Any]", value)]
    return value


def different(name: str, wanted: Any, got: Any) -> list[str]:
    """Key paths whose values differ, with both."""
    if isinstance(wanted, dict) and isinstance(got, dict):
        there, here = cast("dict[str, Any]", wanted), cast("dict[str, Any]", got)
        keys = sorted(there.keys() | here.keys())
        pairs = ((f"{name}: {key}", there.get(key), here.get(key)) for key in keys)
        return [fault for pair in pairs for fault in different(*pair)]
    return [] if wanted == got else [f"{name}: {wanted!r} became {got!r}"]


def episodes(folder: Path) -> "Counter[tuple[str, int, int, tuple[str, ...]]]":
    """An iteration's episodes: task, attempt, replayed steps, what was done; and how often each."""
    found: Counter[tuple[str, int, int, tuple[str, ...]]] = Counter()
    for item in read_trajectories(folder):
        episode = item.trajectory
        actions = tuple(step.action.text for step in episode.steps)
        found[episode.task.id, episode.attempt, episode.replayed, actions] += 1
    return found


def report(whole: Path, recipe: str, wall_s: float, runs: list[Killed], ok: bool) -> None:
    """Print a table and keep the same as JSON."""
    table = Table("run", "kills", "wall s", "differences", title=f"{recipe}: killed and resumed")
    table.add_row("whole", "0", f"{wall_s:.1f}", "-")
    for index, run in enumerate(runs):
        faults = str(len(run.faults))
        table.add_row(f"killed-{index}", str(len(run.kills_s)), f"{run.wall_s:.1f}", faults)
    console = Console()
    console.print(table)
    for run in runs:
        for fault in run.faults:
            console.print(fault, style="red", markup=False)
    console.print("identical" if ok else "NOT identical, or not all kills came in time")
    RESULTS.parent.mkdir(exist_ok=True)
    data = {
        "recipe": recipe,
        "identical": ok,
        "kills": sum(len(run.kills_s) for run in runs),
        "iterations": len(iterations(whole)),
        "episodes": sum(episodes(folder).total() for folder in iterations(whole)),
        "whole_wall_s": round(wall_s, 3),
        "runs": [vars(run) for run in runs],
    }
    write_json(RESULTS, data)


if __name__ == "__main__":
    sys.exit(main())
