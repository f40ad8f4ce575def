"""GRPO on single-turn countdown against TRL's GRPOTrainer: seconds a step, success after as many.

    python benchmarks/grpo.py [--steps 60] [--tasks 1200]

Both begin with the same warmed-up model and learn the same LoRA from 256 completions a step, 8 for
each of 32 puzzles, by the same rewards, sampled by transformers at temperature 1 on two threads, in
processes of their own, one after another. Each may choose the best of three learning rates. TRL
runs as it does here best: no gradient checkpointing, no bf16, no logging, one micro-batch, no KL.
Seconds a step are all a step takes, from tasks to new weights, without evaluation: the median over
all steps but the first two. Success is greedy, on the same held-out puzzles for everybody, played
by our policy. ``self_imitation``, with settings chosen on another seed, is run beside them; how
long it needs to reach TRL's success is read off its checkpoints, every fifth of which is examined.
"""

# torch, trl and datasets have no complete types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import argparse
import asyncio
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from selfwright.agents.chat import Chat, ChatConfig
from selfwright.commands.console import Display
from selfwright.core.files import read_json, write_json
from selfwright.core.hosting.pool import open_worlds
from selfwright.core.play.draw import Given, draw
from selfwright.core.recipe import read
from selfwright.core.seeds import derive
from selfwright.core.types import Observation
from selfwright.environments.countdown import Countdown, CountdownConfig
from selfwright.loop.evaluate import evaluate_checkpoint
from selfwright.loop.progress import Progress
from selfwright.loop.run import run
from selfwright.loop.warm_start import prepare

RESULTS = Path(__file__).parent / "results" / "grpo.json"
THREADS = 2
LIMIT_S = 1800
GROUPS, ATTEMPTS = 32, 8
MAX_TOKENS = 16
LORA = {"rank": 16, "alpha": 32}
RATES = {"ours": (5e-4, 1e-3, 2e-3), "trl": (5e-4, 1e-3, 2e-3), "self_imitation": (5e-4,)}
EVERY = 5
"""Iterations between two looks at ``self_imitation``."""
TARGET = 0.8
"""At most this share of TRL's seconds a step."""
WORLD: dict[str, Any] = {"numbers": 3, "largest": 20, "target": 99, "attempts": 1}
RECIPE = """
seed: 0
iterations: 1
environment: {use: countdown, numbers: 3, largest: 20, target: 99, attempts: 1, parallel: 2048}
policy:
  model: scratch:128x4
  max_tokens: 16
  batch_size: 1024
  warm_start:
    {updates: 150, demonstrations: 8000, batch_size: 256, learning_rate: 2e-3}
trainer: {use: grpo, tasks_per_iteration: 32, attempts_per_task: 8}
learner: {rank: 16, alpha: 32, batch_size: 256}
evaluation: {tasks: 400, every: 0, turns: 0}
"""
SPEAR = (
    "trainer.use=self_imitation",
    "trainer.buffer_size=64",
    "trainer.imitation_warmup=3",
    "trainer.tool_reward=0.0",
    "trainer.length=16",
)


def main() -> int:
    """0 if ours is fast enough and at least as good."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tasks", type=int, default=1200, help="held out")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child_main(json.loads(arguments.child))))
        return 0
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="selfwright-") as folder:
        recipe = Path(folder) / "grpo.yaml"
        recipe.write_text(RECIPE)
        base = asyncio.run(warmed(recipe, console))
        before = success(base, None, arguments.tasks, Path(folder) / "base")
        console.print(f"base: {before:.1%} of {arguments.tasks}")
        found: dict[str, list[dict[str, Any]]] = {}
        for rate_at in range(3):
            for side, rates in RATES.items():
                if rate_at >= len(rates):
                    continue
                asked = {"side": side, "rate": rates[rate_at], "steps": arguments.steps}
                asked |= {"base": base, "recipe": str(recipe), "tasks": arguments.tasks}
                told = child(asked | {"output": f"{folder}/{side}-{rate_at}"})
                found.setdefault(side, []).append(told)
                console.print(f"{side} at {told['rate']:g}: {told['success']:.1%}", end=", ")
                console.print(f"{told['step_s']:.2f} s a step")
    best = {side: max(several, key=lambda one: one["success"]) for side, several in found.items()}
    ratio = best["ours"]["step_s"] / best["trl"]["step_s"]
    reached = time_to(best["self_imitation"]["curve"], best["trl"]["success"])
    whole = best["trl"]["step_s"] * arguments.steps
    result = {
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
        "threads": THREADS,
        "steps": arguments.steps,
        "tasks": arguments.tasks,
        "base": before,
        "runs": found,
        "seconds_ratio": round(ratio, 3),
        "target": TARGET,
        "self_imitation_reaches_trl_after_s": reached,
        "trl_s": round(whole, 1),
    }
    write_json(RESULTS, result)
    Console(width=110).print(table(best, before))
    faster = ratio <= TARGET and best["ours"]["success"] >= best["trl"]["success"]
    return 0 if faster and reached is not None and reached <= whole / 2 else 1


def time_to(curve: Sequence[tuple[float, float]], wanted: float) -> float | None:
    """Seconds of training after which ``wanted`` was first reached; None: never."""
    return next((seconds for seconds, rate in curve if rate >= wanted), None)


def table(best: dict[str, dict[str, Any]], before: float) -> Table:
    shown = Table(title="GRPO on single-turn countdown, each at its best learning rate")
    for title in ("who", "rate", "s a step", "before", "after"):
        shown.add_column(title, justify="right")
    for side, one in best.items():
        cells = (
            f"{one['rate']:g}",
            f"{one['step_s']:.2f}",
            f"{before:.1%}",
            f"{one['success']:.1%}",
        )
        shown.add_row(side, *cells)
    return shown


async def warmed(recipe: Path, console: Console) -> str:
    plan = read(recipe)
    settings = plan.environment.config.model_dump(mode="json")
    async with await open_worlds(plan.environment.use, settings, plan.fleet) as worlds:
        return await prepare(plan, worlds, Progress(Display(console)))


def success(base: str, adapter: str | None, tasks: int, output: Path) -> float:
    """Greedy, on test tasks; the adapter is noted to belong to ``base``."""
    if adapter is not None:
        card = Path(adapter) / "adapter_config.json"
        write_json(card, read_json(card) | {"base_model_name_or_path": base})
    options = [f"environment.{key}={value}" for key, value in WORLD.items()]
    options += [f"policy.max_tokens={MAX_TOKENS}", "environment.parallel=1024"]
    asked = (adapter or base, "countdown", options, "test", tasks, 0, 0.0, output)
    return asyncio.run(evaluate_checkpoint(*asked))["success_rate"]


def child(asked: dict[str, Any]) -> dict[str, Any]:
    """One run in a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps(asked)]
    calm = {"OMP_NUM_THREADS": str(THREADS), "GOMP_SPINCOUNT": "10000"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_S, env=os.environ | calm
    )
    if done.returncode:
        raise RuntimeError(f"a run failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def child_main(asked: dict[str, Any]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(THREADS)
    made = with_trl(asked) if asked["side"] == "trl" else with_ours(asked)
    adapter = made.pop("adapter")
    output = Path(asked["output"] + "-exam")
    return {
        "rate": asked["rate"],
        "success": success(asked["base"], adapter, asked["tasks"], output),
        **made,
    }


def with_ours(asked: dict[str, Any]) -> dict[str, Any]:
    policy = {"model": asked["base"], "max_tokens": MAX_TOKENS, "batch_size": 1024}
    overrides = [
        f"iterations={asked['steps']}",
        f"learner.learning_rate={asked['rate']}",
        f"policy={json.dumps(policy)}",
        "evaluation.tasks=1",
        *(SPEAR if asked["side"] == "self_imitation" else ()),
    ]
    output = Path(asked["output"])
    asyncio.run(run(read(asked["recipe"], overrides), output))
    several = [read_json(f) for f in sorted(output.glob("iterations/*/metrics.json"))]
    # Keeping everything on disk, which TRL does not do here, is part of a step of ours.
    seconds = [m["time/rollout_s"] + m["time/learn_s"] + m["time/store_s"] for m in several]
    looks = range(EVERY, asked["steps"] + 1, EVERY) if asked["side"] == "self_imitation" else ()
    curve = [
        (
            sum(seconds[:k]),
            success(
                asked["base"],
                str(output / "iterations" / f"{k - 1:04d}" / "checkpoint"),
                asked["tasks"],
                Path(f"{output}-{k}"),
            ),
        )
        for k in looks
    ]
    return {
        "step_s": statistics.median(seconds[2:]),
        "curve": curve,
        "adapter": str(output / "iterations" / f"{asked['steps'] - 1:04d}" / "checkpoint"),
    }


def with_trl(asked: dict[str, Any]) -> dict[str, Any]:
    trl: Any = importlib.import_module("trl")
    transformers: Any = importlib.import_module("transformers")
    from datasets import Dataset
    from huggingface_hub import constants
    from peft import LoraConfig

    constants.HF_HUB_DISABLE_TELEMETRY = True
    world = Countdown(CountdownConfig.model_validate(WORLD))
    agent = Chat(ChatConfig.model_validate({}))
    # The very tasks that a run of ours with seed 0 draws.
    tasks = [
        task
        for k in range(asked["steps"])
        for task in asyncio.run(
            draw(Given(world.tasks("train")), GROUPS, derive(derive(0, "iteration", k), "tasks"))
        )
    ]
    by_id = {task.id: task for task in tasks}

    def reward(completions: Sequence[Any], task: Sequence[str], **_: Any) -> list[float]:
        async def paid(said: str, name: str) -> float:
            await world.reset(by_id[name], 0)
            return (await world.step(said.strip())).reward

        async def all_paid() -> list[float]:
            pairs = zip(completions, task, strict=True)
            return [await paid(said[0]["content"], name) for said, name in pairs]

        return asyncio.run(all_paid())

    prompts = [
        [
            {"role": m.role, "content": m.text}
            for m in agent.prompt(task, (), Observation("")).messages
        ]
        for task in tasks
    ]
    marks: list[float] = []

    class Stopwatch(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            marks.append(time.perf_counter())

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory(prefix="selfwright-") as folder:
        trainer = trl.GRPOTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(asked["base"], dtype="float32"),
            processing_class=transformers.AutoTokenizer.from_pretrained(asked["base"]),
            reward_funcs=reward,
            train_dataset=Dataset.from_dict({"prompt": prompts, "task": [t.id for t in tasks]}),
            peft_config=LoraConfig(
                r=LORA["rank"],
                lora_alpha=LORA["alpha"],
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
            args=trl.GRPOConfig(
                folder,
                per_device_train_batch_size=GROUPS * ATTEMPTS,
                num_generations=ATTEMPTS,
                max_completion_length=MAX_TOKENS,
                max_steps=asked["steps"],
                learning_rate=asked["rate"],
                lr_scheduler_type="constant",
                loss_type="grpo",
                beta=0.0,
                temperature=1.0,
                shuffle_dataset=False,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                dataloader_pin_memory=False,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.add_callback(Stopwatch())
        trainer.train()
        adapter = asked["output"]
        trainer.model.save_pretrained(adapter, save_embedding_layers=False)
    # From a step's end to the next one's: what is drawn and sampled between belongs to it.
    ends = marks[1::2]
    steps = [later - sooner for sooner, later in pairwise(ends)]
    return {"step_s": statistics.median(steps[1:]), "curve": [], "adapter": adapter}


if __name__ == "__main__":
    sys.exit(main())
