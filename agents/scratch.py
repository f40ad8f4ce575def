"""A small model made here: tokenizer from a world's own words, weights from a seed.

For machines that reach no model hub, and for proofs that must run in minutes. Either one of text
alone (Qwen3's architecture), or one that sees, too (Idefics3's: patches through a small
transformer, their features side by side joined four to one, then a Llama).
"""

# torch.random and save_pretrained are partly untyped.
# pyright: reportUnknownMemberType=false

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..core.errors import ModelError
from ..core.files import write_json

PREFIX, SEEING = "scratch:", "scratch-vlm:"
END, PAD = "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Append-only: a longer conversation starts with all of a shorter one."""
TEMPLATE_OF_PARTS = TEMPLATE.replace(
    "{{ m['content'] }}",
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}",
)
SIDE, PATCH, JOINED = 32, 4, 2
"""Pixels of a picture's side, which is scaled to that, and of a patch's; patches of the side of a
square that become one token: 16 a picture."""
MARKS = {
    "fake_image_token": "<fake_token_around_image>",
    "image_token": "<image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}


def is_scratch(model: str) -> bool:
    """Whether ``model`` is one to be made here."""
    return model.startswith((PREFIX, SEEING))


def parse(model: str) -> tuple[int, int]:
    """``scratch:WIDTHxLAYERS`` or ``scratch-vlm:WIDTHxLAYERS`` as (width, layers).

    Raises:
        ModelError: any other form, or a width that is no multiple of 32.
    """
    found = re.fullmatch(rf"(?:{PREFIX}|{SEEING})(\d+)x(\d+)", model)
    width, layers = map(int, found.groups()) if found else (0, 0)
    if not (32 <= width <= 4096 and width % 32 == 0 and 1 <= layers <= 64):
        raise ModelError(
            f"cannot make {model!r}: the form is scratch:WIDTHxLAYERS, or scratch-vlm:WIDTHxLAYERS "
            "for one that sees, with a width that is a multiple of 32 and 1 to 64 layers, such as "
            "scratch:128x4"
        )
    return width, layers


def make(model: str, texts: Iterable[str], folder: Path, seed: int) -> None:
    """Write an untrained model and a tokenizer trained on ``texts`` to ``folder``."""
    import torch
    from transformers import Idefics3ForConditionalGeneration, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    sees = model.startswith(SEEING)
    tokenizer = _tokenizer(texts)
    if sees:
        tokenizer.add_special_tokens({"extra_special_tokens": [*MARKS.values()]})
        tokenizer.chat_template = TEMPLATE_OF_PARTS
    config = config_of(model, tokenizer)
    kind: Any = Idefics3ForConditionalGeneration if sees else Qwen3ForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        weights = kind(config)
    weights.generation_config.eos_token_id = tokenizer.eos_token_id
    weights.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if sees:
        save_processor(folder)


def save_processor(folder: Path) -> None:
    """Write what makes tensors of pictures: each is scaled as a whole and never cut up."""
    from transformers import Idefics3ImageProcessorPil

    whole = {"longest_edge": SIDE}
    processor = Idefics3ImageProcessorPil(
        size=whole, max_image_size=whole, do_image_splitting=False
    )
    processor.save_pretrained(folder)
    tokens = (SIDE // PATCH // JOINED) ** 2
    settings = {"processor_class": "Idefics3Processor", "image_seq_len": tokens}
    write_json(folder / "processor_config.json", settings)


def eye_config(width: int, layers: int) -> dict[str, Any]:
    """Idefics3's settings of a small transformer that looks at patches."""
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "image_size": SIDE,
        "patch_size": PATCH,
    }


def config_of(model: str, tokenizer: Any = None) -> Any:
    """Its architecture; without a tokenizer, with a vocabulary of one.

    Raises:
        ModelError: as ``parse``.
    """
    from transformers import Idefics3Config, LlamaConfig, Qwen3Config

    width, layers = parse(model)
    language: dict[str, Any] = {
        "vocab_size": len(tokenizer) if tokenizer else 1,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        # One for all: a small cache is what makes sampling fast on a CPU.
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id if tokenizer else None,
        "pad_token_id": tokenizer.pad_token_id if tokenizer else None,
    }
    if model.startswith(PREFIX):
        return Qwen3Config(**language)
    return Idefics3Config(
        text_config=LlamaConfig(**language).to_dict(),
        vision_config=eye_config(width, max(2, layers // 2)),
        scale_factor=JOINED,
        image_token_id=tokenizer.convert_tokens_to_ids(MARKS["image_token"]) if tokenizer else 0,
        tie_word_embeddings=True,
        eos_token_id=language["eos_token_id"],
        pad_token_id=language["pad_token_id"],
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
