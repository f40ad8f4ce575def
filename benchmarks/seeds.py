"""Runs a recipe with several seeds and tells what came of each: the claim, and how firm it is.

    python benchmarks/seeds.py quickstart [--seeds 3] [--output runs/seeds]

Every seed is a run of its own, from its base model on: another model, other training tasks, other
test tasks. A run that is there already is not made again, so a killed command goes on where it was.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from selfwright.core.files import write_json

RESULTS = Path(__file__).parent / "results"
SELFWRIGHT = Path(sys.executable).with_name("selfwright")
LIMIT_S = 6 * 3600


def main() -> int:
    """0 if every seed ends better than it began."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", help="a recipe's name or file")
    parser.add_argument("-o", dest="overrides", action="append", default=[], help="key.path=value")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/seeds"))
    arguments = parser.parse_args()
    overrides = cast("list[str]", arguments.overrides)
    name = "-".join(Path(arguments.recipe).with_suffix("").parts[-2:])
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        folder = arguments.output / f"{name}-{seed}"
        rows.append(row(seed, played(arguments.recipe, [*overrides, f"seed={seed}"], folder)))
    Console(width=118).print(table(name, rows))
    gains = [one["difference"] for one in rows]
    error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else None
    found = {"recipe": name, "overrides": overrides, "cores": os.cpu_count(), "seeds": rows}
    found |= {"mean_difference": round(statistics.mean(gains), 4), "standard_error": error}
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"seeds-{name}.json", found)
    return 0 if all(one["verdict"] == "better" for one in rows) else 1


def played(recipe: str, overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """The result of one run."""
    command = [str(SELFWRIGHT), "run", recipe, "--output", str(folder), "--json"]
    for override in overrides:
        command += ["-o", override]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}")
    return json.loads(done.stdout)


def row(seed: int, result: dict[str, Any]) -> dict[str, Any]:
    compared: dict[str, Any] = result["comparison"]
    tables: dict[str, dict[str, Any]] = result["introspection"] or {}
    told: dict[str, Any] = {
        "seed": seed,
        "tasks": result["final"]["tasks"],
        "base": result["base"]["success_rate"],
        "final": result["final"]["success_rate"],
        **{key: compared[key] for key in ("difference", "interval", "p_value", "verdict")},
    }
    for when, one in tables.items():
        told[f"introspection_{when}"] = {
            f"m1@t{one['k']}": one["m1_tk"]["rate"],
            "m1@t1": one["m1_t1"]["rate"],
            f"m{one['k']}@t1": one["mk_t1"]["rate"],
            f"p1@t{one['k']}": one["p1_tk"]["rate"],
            "gain": round(one["m1_tk"]["rate"] - one["m1_t1"]["rate"], 4),
        }
    told["wall_s"] = round(result["wall_s"], 1)
    told["warm_start"] = result["warm_start"]
    for key in ("environment_steps", "tokens_sampled", "tokens_trained"):
        told[key] = result[key]
    return told


def table(name: str, rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table(title=f"{name}, {rows[0]['tasks']} held-out tasks each")
    titles = ("seed", "before", "after", "difference", "95% interval", "p", "verdict")
    for title in (*titles, "m1@tk - m1@t1", "wall s"):
        shown.add_column(title, justify="right")
    for one in rows:
        low, high = one["interval"]
        gains = [one.get(f"introspection_{when}") for when in ("base", "final")]
        mended = " to ".join(f"{100 * gain['gain']:+.1f}" for gain in gains if gain)
        shown.add_row(
            str(one["seed"]),
            f"{one['base']:.1%}",
            f"{one['final']:.1%}",
            f"{100 * one['difference']:+.1f}",
            f"{100 * low:+.1f} to {100 * high:+.1f}",
            f"{one['p_value']:.1g}",
            one["verdict"],
            mended or "-",
            f"{one['wall_s']:.0f}",
        )
    return shown


if __name__ == "__main__":
    sys.exit(main())
