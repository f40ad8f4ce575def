"""How long it takes to import the package and to show the command's help.

    python benchmarks/startup.py [--runs 10]

Each is a process of its own, started and awaited, whole: nothing is subtracted, and what a bare
Python takes is shown beside them. They take turns; the first of each, which may still read files
from the disk, is not counted.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from selfwright.core.files import write_json

RESULTS = Path(__file__).parent / "results" / "startup.json"
COMMANDS: dict[str, tuple[list[str], float | None]] = {
    "python -c pass": ([sys.executable, "-c", "pass"], None),
    "import selfwright": ([sys.executable, "-c", "import selfwright"], 0.15),
    "selfwright --help": ([str(Path(sys.executable).with_name("selfwright")), "--help"], 0.5),
}
"""What is run, and the most seconds it may take."""
LIMIT_S = 60


def main() -> int:
    """0 if every target is met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=10, help="of each command")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a JSON file")
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    # Elsewhere, so that no folder of the source tree is found first.
    with tempfile.TemporaryDirectory(prefix="selfwright-") as folder:
        for k in range(arguments.runs + 1):
            for name, (command, _) in COMMANDS.items():
                took = timed(command, folder)
                if k:
                    seconds[name].append(took)
    found = {name: summary(many, COMMANDS[name][1]) for name, many in seconds.items()}
    Console().print(table(found))
    packages = ("selfwright", "pydantic", "rich", "typer")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        arguments.output,
        {
            "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
            "runs": arguments.runs,
            "commands": found,
        },
    )
    return 0 if all(one["met"] for one in found.values()) else 1


def timed(command: Sequence[str], folder: str) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT_S)
    took = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{command[-1]!r} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return took


def summary(many: Sequence[float], target: float | None) -> dict[str, Any]:
    median = statistics.median(many)
    return {
        "median_s": round(median, 4),
        "least_s": round(min(many), 4),
        "most_s": round(max(many), 4),
        "target_s": target,
        "met": target is None or median < target,
    }


def table(found: dict[str, dict[str, Any]]) -> Table:
    shown = Table(title="start-up, seconds")
    shown.add_column("what")
    for title in ("median", "least", "most", "target"):
        shown.add_column(title, justify="right")
    for name, one in found.items():
        times = (f"{one[key]:.3f}" for key in ("median_s", "least_s", "most_s"))
        target = "" if one["target_s"] is None else f"< {one['target_s']}"
        shown.add_row(name, *times, target)
    return shown


if __name__ == "__main__":
    sys.exit(main())
