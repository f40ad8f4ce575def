"""A small language model made here: tokenizer from a world's own words, weights from a seed.

For machines that reach no model hub, and for proofs that must run in minutes.
"""

# torch.random and save_pretrained are partly untyped.
# pyright: reportUnknownMemberType=false

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..core.errors import ModelError

PREFIX = "scratch:"
END, PAD = "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Append-only: a longer conversation starts with all of a shorter one."""


def parse(model: str) -> tuple[int, int]:
    """``scratch:WIDTHxLAYERS`` as (width, layers).

    Raises:
        ModelError: any other form, or a width that is no multiple of 32.
    """
    found = re.fullmatch(rf"{PREFIX}(\d+)x(\d+)", model)
    width, layers = map(int, found.groups()) if found else (0, 0)
    if not (32 <= width <= 4096 and width % 32 == 0 and 1 <= layers <= 64):
        raise ModelError(
            f"cannot make {model!r}: the form is scratch:WIDTHxLAYERS, with a width that is a "
            "multiple of 32 and 1 to 64 layers, such as scratch:128x4"
        )
    return width, layers


def make(model: str, texts: Iterable[str], folder: Path, seed: int) -> None:
    """Write an untrained Qwen3-type model and a tokenizer trained on ``texts`` to ``folder``."""
    import torch
    from transformers import Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = _tokenizer(texts)
    config = config_of(model, tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        weights = Qwen3ForCausalLM(config)
    weights.generation_config.eos_token_id = tokenizer.eos_token_id
    weights.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def config_of(model: str, tokenizer: Any = None) -> Any:
    """Its architecture; without a tokenizer, with a vocabulary of one.

    Raises:
        ModelError: as ``parse``.
    """
    from transformers import Qwen3Config

    width, layers = parse(model)
    return Qwen3Config(
        vocab_size=len(tokenizer) if tokenizer else 1,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        # One for all: a small cache is what makes sampling fast on a CPU.
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id if tokenizer else None,
        pad_token_id=tokenizer.pad_token_id if tokenizer else None,
    )


def _tokenizer(texts: Iterable[str]) -> Any:
    """Byte-level, so nothing is unknown; words of the corpus are one token, digits one each."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r"\s?[A-Za-z]+|\s?\d|\s?[^\sA-Za-z\d]|\s"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    return fast
