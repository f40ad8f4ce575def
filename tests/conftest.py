"""Models that many tests share: tiny, untrained, made once per session."""

import fcntl
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Before torch is imported, and for every process that a test starts: several tests run at once, and
# over matrices this small threads would mostly wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"

# A shell that starts tests in the background has them ignore interrupts, and so would all that they
# start: some tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says how busy the machine is. Whole tests have their time limit.
settings.register_profile("selfwright", deadline=None)
settings.load_profile("selfwright")

LONGEST = (
    "test_ray",
    "test_check",
    "test_launch",
    "test_methods",
    "test_improvement",
    "test_loop",
    "test_vllm_replicas",
    "test_vllm",
)
"""Files that take minutes, and are begun first: a worker does a whole file, and none should be left
with one when the others have done."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""As reasoning models have it: earlier thoughts are dropped, so it is not append-only."""


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model of that kind.

    ``scratch``: as users get it. The others have large random weights, so that a wrong mask or
    position shows: ``qwen3``; ``llama``, with a template that drops thoughts; ``mistral``, with a
    sliding window; ``hybrid``, with a layer of linear attention; ``wide``, with far more logits
    than its tokenizer has tokens; ``vllm``, a ``qwen3`` with heads of a size that vLLM knows.
    """
    from selfwright.agents import scratch
    from selfwright.environments.countdown import Countdown, CountdownConfig

    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("models")

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = root / kind
            if kind == "scratch":
                tasks = Countdown(CountdownConfig.model_validate({})).tasks("train")
                texts = [tasks[k].instruction for k in range(200)]
                scratch.make("scratch:32x2", texts, made[kind], seed=0)
            else:
                _lively(kind, folder("scratch"), made[kind])
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def player(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that plays the world of ``components.SINGLE`` a little."""
    from components import warmed

    room = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        room = room.parent  # All workers': whoever comes first makes it for all.
    room = room / "player"
    room.mkdir(exist_ok=True)
    with (room / "lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        patch.setenv("SELFWRIGHT_CACHE", str(room))
        return warmed(room, "updates: 200")[0]


def _lively(kind: str, scratch_folder: Path, folder: Path) -> None:
    import torch
    import transformers

    # Most of it has no types.
    hf: Any = transformers
    tokenizer = hf.AutoTokenizer.from_pretrained(scratch_folder)
    settings: dict[str, Any] = {
        "vocab_size": 12_000 if kind == "wide" else len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32 if kind == "vllm" else 16,
        "initializer_range": 0.3,
        "max_position_embeddings": 512,
        "tie_word_embeddings": kind != "llama",
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    rng: Any = torch.random
    with rng.fork_rng():
        rng.manual_seed(1)
        match kind:
            case "qwen3" | "wide" | "vllm":
                config: Any = hf.Qwen3Config(**settings)
            case "llama":
                config = hf.LlamaConfig(**settings)
                tokenizer.chat_template = THINKING
            case "mistral":
                config = hf.MistralConfig(**settings, sliding_window=6)
            case "hybrid":
                config = hf.Qwen3_5TextConfig(
                    **settings,
                    layer_types=["linear_attention", "full_attention"],
                    linear_num_key_heads=2,
                    linear_num_value_heads=4,
                    linear_key_head_dim=16,
                    linear_value_head_dim=16,
                )
            case _:
                raise ValueError(kind)
        model = hf.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
