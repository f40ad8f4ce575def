"""Worlds in other processes: steps a second of a trivial one, and what a picture costs.

    python benchmarks/worlds.py [--python PATH ...] [--node PATH]

One instance in one process is stepped, one step after another: by this interpreter, by each one
that is named, by Node. A step with a picture brings the file of a 1280x720 PNG of about 300 kB; its
cost is over that of a step without. Results go to ``benchmarks/results/worlds.json``.
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pictures import png

from selfwright.core.config import Fleet
from selfwright.core.hosting.pool import open_worlds

RESULT = Path(__file__).with_name("results") / "worlds.json"
ROUNDS = 5
PYTHON = """
class Trivial:
    def __init__(self, picture=""):
        self.png = open(picture, "rb").read() if picture else b""

    def tasks(self, split):
        return [{"id": split, "instruction": "go", "max_steps": 10**6}]

    def reset(self, task, seed):
        return "hello"

    def step(self, action):
        seen = {"text": "on", "images": [self.png]} if self.png else "on"
        return seen, 0.0, False, False

    def close(self):
        pass
"""
NODE = """
const { serve } = await import(`${process.env.SELFWRIGHT_FAR_ENDS}/far_end.mjs`);
const { readFileSync } = await import("node:fs");
serve(class {
  constructor({ picture = "" }) { this.images = picture ? [readFileSync(picture)] : []; }
  tasks(split) { return [{ id: split, instruction: "go", max_steps: 1e6 }]; }
  reset() { return "hello"; }
  step() { return { observation: { text: "on", images: this.images }, reward: 0 }; }
  close() {}
});
"""


async def seconds(name: str, where: dict[str, Any], config: dict[str, str], steps: int) -> float:
    """Of one step, in the median round."""
    fleet = Fleet.model_validate({"parallel": 1, "isolation": "process", **where})
    async with await open_worlds(name, config, fleet) as worlds, worlds.lease() as world:
        await world.reset(await worlds.tasks("train").at(0), 1)
        times: list[float] = []
        for _ in range(ROUNDS + 1):  # the first one warms up
            began = time.perf_counter()
            for _ in range(steps):
                await world.step("on")
            times.append((time.perf_counter() - began) / steps)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", action="append", default=[])
    parser.add_argument("--node", default=shutil.which("node") or "")
    asked = parser.parse_args()
    pythons = [str(Path(path).absolute()) for path in asked.python]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as room:
        (Path(room) / "trivial.py").write_text(PYTHON)
        (Path(room) / "trivial.mjs").write_text(NODE)
        picture = Path(room) / "shot.png"
        picture.write_bytes(png(0, 1280, 720, 300_000))
        os.chdir(room)
        kinds: dict[str, dict[str, Any]] = {
            path: {"python": path} for path in [sys.executable, *pythons]
        }
        if asked.node:
            kinds[asked.node] = {"command": (asked.node, f"{room}/trivial.mjs")}
        for program, where in kinds.items():
            plain = asyncio.run(seconds("trivial:Trivial", where, {}, 2000))
            shot = {"picture": str(picture)}
            with_picture = asyncio.run(seconds("trivial:Trivial", where, shot, 300))
            found[version_of(program)] = {
                "steps_per_s": round(1 / plain),
                "picture_kb": round(picture.stat().st_size / 1000),
                "picture_ms": round(1000 * (with_picture - plain), 2),
            }
    print(json.dumps(found, indent=1))
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


def version_of(program: str) -> str:
    asked = [program, "--version"]
    told = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True).stdout
    return told.strip() if told.startswith("Python") else f"Node {told.strip()}"


if __name__ == "__main__":
    main()
