"""How far the log-probabilities that a run's engine gave are from those of the learner's weights.

    python benchmarks/agreement.py RUN [--completions 400]

Of every iteration some of the completions it learned from are scored anew, in this process, with
the weights that sampled them, as the learner computes them. Nats per token, and what they make of
the importance ratio, which at the first update should be 1.
"""

import argparse
import asyncio
import math
import random
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from selfwright.agents.engines.transformers import TransformersConfig, TransformersPolicy
from selfwright.core.files import read_json, write_json
from selfwright.core.models.origin import parts_of
from selfwright.core.protocols import Agent
from selfwright.core.recipe import section
from selfwright.core.store.folder import iteration_name, iterations
from selfwright.trainers.learning.examples import asked
from selfwright.trainers.parts.credit import stored

RESULTS = Path(__file__).parent / "results" / "agreement.json"


def main() -> int:
    """0 if the tokens' log-probabilities agree to 1e-2 nats in 99 of 100 cases."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--completions", type=int, default=400, help="of each iteration")
    arguments = parser.parse_args()
    told = asyncio.run(compared(arguments.run, arguments.completions))
    write_json(RESULTS, told)
    shown = Table(title=f"|engine - learner|, nats per token, engine {told['engine']}")
    for title in ("iteration", "tokens", "median", "99 %", "most", "ratio, mean"):
        shown.add_column(title, justify="right")
    for one in told["iterations"]:
        numbers = (f"{one[key]:.2g}" for key in ("median", "p99", "most"))
        shown.add_row(str(one["iteration"]), str(one["tokens"]), *numbers, f"{one['ratio']:.6f}")
    Console(width=100).print(shown)
    return 0 if all(one["p99"] < 1e-2 for one in told["iterations"]) else 1


async def compared(run: Path, completions: int) -> dict[str, Any]:
    recipe = read_json(run / "recipe.json")
    settings = {k: v for k, v in recipe["agent"].items() if k != "use"}
    agent: Agent = section("agent", recipe["agent"]["use"], (), settings)[0].make()
    base = parts_of(str(run))[0]
    policy = TransformersPolicy(TransformersConfig.model_validate({"model": base}), base, 0)
    found: list[dict[str, Any]] = []
    try:
        for index, folder in enumerate(iterations(run)):
            if index:
                await policy.load(run / iteration_name(index - 1) / "checkpoint")
            turns = [
                (one.trajectory, turn)
                for one in stored(folder, agent)
                for turn in range(one.trajectory.replayed, len(one.trajectory.steps))
                if one.trajectory.steps[turn].action.completion.version == index
            ]
            gaps: list[float] = []
            for played, turn in random.Random(index).sample(turns, min(completions, len(turns))):
                said = played.steps[turn].action.completion
                mine = await policy.score(asked(played, turn), said)
                gaps += [a - b for a, b in zip(mine.logprobs, said.logprobs, strict=True)]
            found.append({"iteration": index + 1, **summary(gaps)})
    finally:
        await policy.close()
    return {"recipe": recipe["policy"], "engine": recipe["policy"]["use"], "iterations": found}


def summary(gaps: list[float]) -> dict[str, float]:
    sizes = sorted(map(abs, gaps))
    return {
        "tokens": len(sizes),
        "median": statistics.median(sizes),
        "p99": sizes[int(0.99 * (len(sizes) - 1))],
        "most": sizes[-1],
        "ratio": statistics.fmean(map(math.exp, gaps)),
    }


if __name__ == "__main__":
    sys.exit(main())
