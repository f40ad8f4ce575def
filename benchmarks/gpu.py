"""What one GPU makes of a run: learning, sampling, and how well the two agree, in bf16.

    python benchmarks/gpu.py [--shape 0.6B --shape 1.7B ...] [--seconds 360]
    python benchmarks/gpu.py --shape tiny --output /tmp/gpu.json    (a dry run, anywhere)

Models have the shapes of Qwen3's, random weights, and a tokenizer made here, so nothing is fetched.
It needs torch, transformers, peft, accelerate and what selfwright imports, and no installation:
where there is none, it makes the package importable from its own folder. What cannot be done, as
memory is too small, say, is told in its place. No shape is begun after the time is up.

- learn: a LoRA of rank 16 on all linear layers. Tokens/s over rows as long as stated, all of whose
  answer is trained. MFU counts what has to be computed with frozen weights: per token 4 FLOPs for
  each weight that is multiplied (forward, and backward to the activations), those of the head for
  trained tokens only, and attention; neither recomputation nor padding nor the adapters. Against
  the card's dense bf16 peak. ``ready_s``: from nothing to the end of a first update.
- learn_shots: rows that begin with the same 1,024 tokens, examples/s; read once, and for each.
- sample: the in-process engine against ``generate`` on the same prompts, tokens/s;
  ``sample_shots``: prompts that begin with the same 1,024 tokens.
- agree: |sampler - learner|, nats per sampled token, with an adapter that learned something, and
  beside it how far that adapter moved the learner itself: what a sampler without it would be off.
"""

# torch and transformers are partly untyped.
# pyright: reportUnknownMemberType=false, reportPrivateUsage=false

import argparse
import asyncio
import gc
import importlib
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    importlib.import_module("selfwright")
except ModuleNotFoundError:
    # A link with the package's name, as nothing is installed.
    _links = tempfile.TemporaryDirectory(prefix="selfwright-")
    Path(_links.name, "selfwright").symlink_to(Path(__file__).resolve().parent.parent)
    sys.path.insert(0, _links.name)

from selfwright.agents import scratch
from selfwright.agents.engines.transformers import TransformersConfig, TransformersPolicy
from selfwright.core.files import write_json
from selfwright.core.models.tokens import PAD, ChatTokens
from selfwright.core.types import Batch, Completion, Example, Message, Prompt, Sampling
from selfwright.trainers.learning.learner import LearnerConfig, PlainLearner
from selfwright.trainers.learning.loss import NLL
from selfwright.trainers.learning.pack import Row, pack
from selfwright.trainers.learning.reader import Reader

RESULTS = Path(__file__).parent / "results" / "gpu.json"
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s."""
LEXICON = [a + b + c for a in "bdfglmnprst" for b in "aeiou" for c in ("ck", "ll", "n", "st")]
VOCABULARY = 151_936


@dataclass(frozen=True)
class Shape:
    width: int
    layers: int
    inner: int
    heads: int
    kv_heads: int = 8
    head: int = 128
    vocabulary: int = VOCABULARY
    prompt: int = 512
    """Tokens of a prompt, about."""
    answer: int = 1536
    """Tokens of an answer that is learned."""
    rows: int = 34
    sampled: int = 64
    """Prompts at once."""
    tokens: int = 128
    """Sampled for each."""
    shots: int = 1024
    """Tokens that prompts have in common, about, where they are to have something in common."""


SHAPES = {
    "tiny": Shape(
        *(64, 2, 128, 2, 1, 32),
        vocabulary=2048,
        prompt=24,
        answer=16,
        rows=4,
        sampled=4,
        tokens=8,
        shots=96,
    ),
    "0.6B": Shape(1024, 28, 3072, 16),
    "1.7B": Shape(2048, 28, 6144, 16),
    "4B": Shape(2560, 36, 9728, 32),
}


def main() -> int:
    """0 if everything could be done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", action="append", choices=SHAPES, help="default: all but tiny")
    parser.add_argument("--part", action="append", help="such as learn; default: all")
    parser.add_argument("--seconds", type=float, default=360.0, help="no shape is begun after it")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a JSON file")
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    told: dict[str, Any] = {"device": device(), "versions": versions(), "shapes": {}}
    for name in arguments.shape or [name for name in SHAPES if name != "tiny"]:
        if time.monotonic() - began > arguments.seconds:
            told["shapes"][name] = "not begun: the time was up"
            continue
        told["shapes"][name] = {"shape": asdict(SHAPES[name])}
        for part, found in measured(SHAPES[name], arguments.part or ()):
            told["shapes"][name][part] = found
            print(f"{name} {part}: {found}", flush=True)
            # After each, so that what stops a later one loses nothing.
            write_json(arguments.output, told)
    return 1 if "not done" in str(told) else 0


def device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ("torch", "transformers", "peft", "accelerate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def measured(shape: Shape, only: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """Each part's name and figures, or why it was not done."""
    with tempfile.TemporaryDirectory(prefix="selfwright-") as folder:
        model, adapter = str(Path(folder, "model")), Path(folder, "adapter")
        make(shape, Path(model))
        parts: dict[str, Callable[[], Any]] = {
            "learn": lambda: learn(shape, model),
            "learn_compiled": lambda: learn(shape, model, compile=torch.cuda.is_available()),
            "learn_checkpointed": lambda: learn(shape, model, gradient_checkpointing=True),
            "learn_shots": lambda: learn_shots(shape, model),
            "sample": lambda: asyncio.run(sample(shape, model)),
            "sample_shots": lambda: asyncio.run(sample(shape, model, shape.shots)),
            "agree": lambda: asyncio.run(agree(shape, model, adapter)),
        }
        for name, part in parts.items():
            if only and name not in only:
                continue
            try:
                found = part()
            except (RuntimeError, ValueError) as cause:
                found = f"not done: {type(cause).__name__}: {str(cause).splitlines()[0]}"
            release()
            yield name, found


def make(shape: Shape, folder: Path) -> None:
    """A model with random weights in bf16, and its tokenizer."""
    transformers: Any = importlib.import_module("transformers")
    rng = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="selfwright-") as small:
        scratch.make("scratch:32x1", [words(rng, 200) for _ in range(200)], Path(small), seed=0)
        tokenizer = transformers.AutoTokenizer.from_pretrained(small)
    config = transformers.Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head,
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        weights = transformers.Qwen3ForCausalLM(config).to(torch.bfloat16)
    weights.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    release()


def learner(model: str, **settings: bool) -> PlainLearner:
    told: dict[str, Any] = {
        "rank": 16,
        "alpha": 32,
        "precision": "bfloat16",
        "batch_size": 1 << 10,
        "learning_rate": 1e-3,
    }
    return PlainLearner(LearnerConfig.model_validate(told | settings), model, 0)


def learn(shape: Shape, model: str, **settings: bool) -> dict[str, Any]:
    began = now()
    tuned = learner(model, **settings)
    tokens = tuned._tokens
    learned = examples(shape, tokens, shape.rows)
    batch = Batch(NLL(aggregation="token-mean"), tuple(learned))
    tuned.update(batch, 0.0)
    ready = now() - began
    forget_peak()
    began = now()
    tuned.update(batch, 0.0)
    seconds = now() - began
    rows = pack(learned, tokens)
    lengths = [len(row.ids) for row in rows]
    return {
        "tokens_per_s": round(sum(lengths) / seconds),
        "row": round(sum(lengths) / len(lengths)),
        "rows": len(rows),
        "mfu": mfu(shape, lengths, shape.answer * len(rows), seconds),
        "ready_s": round(ready, 1),
        "peak_gib": peak(),
    }


def mfu(shape: Shape, lengths: Sequence[int], trained: int, seconds: float) -> float | None:
    """Of the card's peak; None if it is not known."""
    limit = next((rate for card, rate in PEAKS.items() if card in device()), None)
    if limit is None:
        return None
    wide = shape.heads * shape.head
    layer = shape.width * (2 * wide + 2 * shape.kv_heads * shape.head + 3 * shape.inner)
    weights = shape.layers * layer * sum(lengths) + shape.vocabulary * shape.width * trained
    # Scores and their use, of half the square, once forward and twice backward.
    attention = sum(6 * shape.layers * wide * length**2 for length in lengths)
    return round((4 * weights + attention) / seconds / limit, 3)


def learn_shots(shape: Shape, model: str) -> dict[str, Any]:
    """Rows that begin with the same shots: which are read once, and for each row."""
    made = learner(model)
    batch = Batch(NLL(), tuple(shown(shape, made._tokens, shape.rows * 2)))
    seconds: dict[str, float] = {}
    keys = Reader._keys

    def unlike(self: Reader, rows: Sequence[Row]) -> list[Any]:
        found = keys(self, rows)
        for k, key in enumerate(found):
            key[0] = -1 - k
        return found

    for name, told in (("once", keys), ("for each", unlike)):
        Reader._keys = told
        made.update(batch, 0.0)
        began = now()
        made.update(batch, 0.0)
        seconds[name] = now() - began
    Reader._keys = keys
    rates = {name: round(len(batch.examples) / found, 1) for name, found in seconds.items()}
    return {"examples_per_s": rates, "ratio": round(seconds["for each"] / seconds["once"], 2)}


def shown(shape: Shape, tokens: ChatTokens, count: int) -> list[Example]:
    """Short tasks and answers behind the same long shots."""
    rng = random.Random(7)
    shots = Message("system", (words(rng, shape.shots),))
    usual = tokens.completion("a")[0]
    found: list[Example] = []
    for _ in range(count):
        asked = Prompt((shots, Message("user", (words(rng, 32),))))
        ids = (*[usual] * 31, tokens.end)
        found.append(Example(asked, Completion(tokens.text(ids), ids)))
    return found


async def sample(shape: Shape, model: str, shots: int = 0) -> dict[str, Any]:
    told = {"model": model, "batch_size": shape.sampled}
    policy = TransformersPolicy(TransformersConfig.model_validate(told), model, 0)
    try:
        given = shown if shots else examples
        asked = [example.prompt for example in given(shape, policy.tokens, shape.sampled)]
        await said(policy, asked[:4], 4)
        generated(policy, asked[:4], 4)
        forget_peak()
        began = now()
        ours = await said(policy, asked, shape.tokens)
        seconds = now() - began
        memory = peak()
        began = now()
        count = generated(policy, asked, shape.tokens)
        rate = sum(len(one.token_ids) for one in ours) / seconds
        return {
            "tokens_per_s": round(rate),
            "generate_tokens_per_s": round(count / (now() - began)),
            "at_once": shape.sampled,
            "peak_gib": memory,
        }
    finally:
        await policy.close()


async def said(policy: TransformersPolicy, asked: Sequence[Prompt], most: int) -> list[Completion]:
    sampling = Sampling(max_tokens=most)
    return list(
        await asyncio.gather(*(policy.complete(p, sampling, k) for k, p in enumerate(asked)))
    )


def generated(policy: TransformersPolicy, asked: Sequence[Prompt], most: int) -> int:
    """Tokens that ``generate`` samples. A random model hardly ever ends."""
    ids = [policy.tokens.prompt(prompt) for prompt in asked]
    longest = max(map(len, ids))
    rows = torch.tensor([[PAD] * (longest - len(one)) + list(one) for one in ids])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in ids])
    with torch.inference_mode():
        made: Tensor = policy.model.generate(
            input_ids=rows.to(policy.model.device),
            attention_mask=mask.to(policy.model.device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=most,
            pad_token_id=PAD,
        )
    return len(ids) * (made.shape[1] - longest)


async def agree(shape: Shape, model: str, adapter: Path) -> dict[str, Any]:
    """Gaps between what the sampler noted of its tokens and what the learner finds."""
    tuned = learner(model)
    loss = NLL(aggregation="token-mean")
    for k in range(8):
        tuned.update(Batch(loss, tuple(examples(shape, tuned._tokens, 4, k))), 0.0)
    tuned.export(adapter)
    policy = TransformersPolicy(TransformersConfig.model_validate({"model": model}), model, 0)
    try:
        prompts = [e.prompt for e in examples(shape, tuned._tokens, min(16, shape.sampled), 99)]
        bare = await said(policy, prompts, shape.tokens)
        await policy.load(adapter)
        loaded = await said(policy, prompts, shape.tokens)
    finally:
        await policy.close()
    sampled = [x for one in loaded for x in one.logprobs]
    learned = scored(tuned, prompts, loaded)
    with tuned._model.disable_adapter():
        before = scored(tuned, prompts, loaded)
    return {
        "tokens": len(sampled),
        "gap": gaps(learned, sampled),
        "moved": gaps(learned, before),
        "mean_nats": {
            "base": round(mean([-x for one in bare for x in one.logprobs]), 3),
            "tuned": round(mean([-x for one in loaded for x in one.logprobs]), 3),
        },
    }


def scored(
    tuned: PlainLearner, prompts: Sequence[Prompt], answers: Sequence[Completion]
) -> list[float]:
    """What the learner finds of every sampled token, nats."""
    found: list[float] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        rows = pack([Example(prompt, answer)], tuned._tokens)
        with torch.no_grad():
            arrays = tuned._forward.arrays(rows, NLL(aggregation="token-mean"))
        found += arrays.logprobs.tolist()
    return found


def gaps(these: Sequence[float], those: Sequence[float]) -> dict[str, float]:
    found = sorted(abs(a - b) for a, b in zip(these, those, strict=True))
    at = {"median": len(found) // 2, "p99": int(len(found) * 0.99), "most": len(found) - 1}
    return {name: round(found[k], 5) for name, k in at.items()}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def examples(shape: Shape, tokens: ChatTokens, count: int, seed: int = 0) -> list[Example]:
    """Prompts of words, and answers of tokens drawn at random from a few."""
    rng = random.Random(seed)
    special = set(tokens.tokenizer.all_special_ids)
    usual = [k for k in range(len(tokens.tokenizer)) if k not in special][:64]
    found: list[Example] = []
    for _ in range(count):
        prompt = Prompt((Message("user", (words(rng, shape.prompt),)),))
        ids = (*rng.choices(usual, k=shape.answer - 1), tokens.end)
        found.append(Example(prompt, Completion(tokens.text(ids), ids)))
    return found


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(LEXICON, k=count))


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak() -> float | None:
    """GiB that tensors took at most; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)


if __name__ == "__main__":
    sys.exit(main())
