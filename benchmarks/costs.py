"""What a method costs: seconds and peak memory for 1,000 to 8,000 trajectories of one iteration.

    python benchmarks/costs.py [--output runs/costs]

Every cell is a process of its own that runs one iteration of a shipped recipe on Countdown, with
the number of tasks that makes about so many trajectories, all counted: candidates, refinements and
teachers' too. Seconds are the iteration's, playing and learning, without evaluations; memory is the
process's highest resident size. Linear means that a line explains the seconds, and that the last
thousand costs at most half more than the first.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from selfwright.core.files import write_json

RESULTS = Path(__file__).parent / "results" / "costs.json"
SIZES = (1000, 2000, 4000, 8000)
PER_TASK: dict[str, float] = {
    "imitation": 8,
    "rise": 30,
    "ilf": 4.6,
    "grpo": 16,
    "spear": 16,
    "ril": 10,
    "srt": 16,
}
"""By recipe: how many trajectories a task comes to, about."""
LIMIT_S = 3600
STEEPER = 1.5
"""How much more a thousand may cost at the end than at first."""


def main() -> int:
    """0 if every method's cost grows linearly."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/costs"))
    parser.add_argument("--methods", nargs="*", default=list(PER_TASK))
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    for name in arguments.methods:
        rows = [cell(name, size, arguments.output / f"{name}-{size}") for size in SIZES]
        found[name] = {"rows": rows} | fitted(rows)
        Console(width=110).print(table(found))
        RESULTS.parent.mkdir(exist_ok=True)
        write_json(RESULTS, {"cores": os.cpu_count(), "methods": found})
    return 0 if all(one["linear"] for one in found.values()) else 1


def cell(name: str, size: int, folder: Path) -> dict[str, float]:
    """One iteration of about ``size`` trajectories."""
    tasks = max(1, round(size / PER_TASK[name]))
    command = [sys.executable, "-m", "selfwright", "run", f"countdown/{name}", "--json"]
    command += ["--output", str(folder)]
    for key, value in (
        ("iterations", 1),
        ("budget.environment_steps", "null"),
        ("trainer.tasks_per_iteration", tasks),
        ("evaluation.tasks", 1),
    ):
        command += ["-o", f"{key}={value}"]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        timer = threading.Timer(LIMIT_S, process.kill)
        timer.start()
        # Not through Popen, which does not tell what was used.
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        if status:
            said.seek(0)
            raise RuntimeError(f"{name} ended badly:\n{said.read().decode()[-2000:]}")
    metrics = json.loads((folder / "iterations" / "0000" / "metrics.json").read_text())
    return {
        "trajectories": metrics["rollout/episodes"],
        "environment_steps": metrics["rollout/environment_steps"],
        "tokens_trained": metrics["train/total_tokens"],
        "rollout_s": round(metrics["time/rollout_s"], 2),
        "learn_s": round(metrics["time/learn_s"], 2),
        "peak_mib": round(usage.ru_maxrss / 1024, 1),
    }


def fitted(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """A line through seconds over trajectories, and how well it fits."""
    x = [row["trajectories"] / 1000 for row in rows]
    y = [row["rollout_s"] + row["learn_s"] for row in rows]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    slope /= sum((a - mean_x) ** 2 for a in x)
    rest = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    fit = 1 - rest / sum((b - mean_y) ** 2 for b in y)
    first, last = y[0] / x[0], (y[-1] - y[-2]) / (x[-1] - x[-2])
    return {
        "seconds_per_1000": round(slope, 2),
        "r_squared": round(fit, 4),
        "first_s_per_1000": round(first, 2),
        "last_s_per_1000": round(last, 2),
        "linear": fit > 0.95 and last <= STEEPER * first,
    }


def table(found: dict[str, Any]) -> Table:
    shown = Table(title="one iteration: seconds and peak MiB by trajectories")
    for title in ("method", *(f"about {size:,}" for size in SIZES), "s per 1,000", "R2", "linear"):
        shown.add_column(title, justify="left" if title == "method" else "right")
    for name, one in found.items():
        cells = (
            f"{row['rollout_s'] + row['learn_s']:.1f} s, {row['peak_mib']:,.0f}"
            for row in one["rows"]
        )
        shown.add_row(
            name,
            *cells,
            f"{one['seconds_per_1000']:.2f}",
            f"{one['r_squared']:.3f}",
            "yes" if one["linear"] else "no",
        )
    return shown


if __name__ == "__main__":
    sys.exit(main())
