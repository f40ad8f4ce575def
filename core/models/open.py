"""Opens language models from disk or hub, safetensors only. torch is imported when called."""

import logging
from pathlib import Path
from typing import Any

from ..errors import ModelError, PolicyError
from .adapters import merge
from .origin import layers_of
from .quantization import Quantization, arguments, steady
from .tokens import ChatTokens


def open_model(
    model: str,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    quantization: Quantization = "none",
) -> tuple[Any, ChatTokens]:
    """Weights and tokenizer of what ``parts_of`` knows, safetensors only; adapters are merged.

    ``quantization``: of the base's linear layers, as in ``quantization.arguments``.

    Raises:
        ModelError: it is not there, is damaged or incomplete, or is no causal language model with
            a chat template, nor one of texts and pictures; or cannot be quantised.
        PolicyError: there is no such device.
    """
    weights = open_weights(model, device, dtype, trust_remote_code, quantization=quantization)
    return weights, open_tokens(model, trust_remote_code)


def open_tokens(
    model: str, trust_remote_code: bool = False, placeholder: int | None = None
) -> ChatTokens:
    """The tokenizer alone, with what spells out pictures if the model sees.

    ``placeholder``: as in ``ChatTokens``; pictures are then left for others to spell out.

    Raises:
        ModelError: as above.
    """
    # Untyped: their from_pretrained is only partly known to a type checker.
    from transformers import AutoTokenizer

    tokenizers: Any = AutoTokenizer
    base, _ = layers_of(model)
    try:
        tokenizer = tokenizers.from_pretrained(base, trust_remote_code=trust_remote_code)
    except Exception as cause:
        raise _cannot_open(model, cause) from cause
    ends = _ends(base, trust_remote_code)
    config = config_of(base, trust_remote_code)
    if placeholder is not None or not sees(config):
        return ChatTokens(tokenizer, placeholder=placeholder, ends=ends)
    from .vision import open_vision

    try:
        vision, tokenizer = open_vision(base, config, tokenizer)
    except Exception as cause:  # It may still be used for text.
        return ChatTokens(tokenizer, ends=ends, blind=f": {cause}")
    return ChatTokens(tokenizer, ends=ends, vision=vision)


def sees(config: Any) -> bool:
    """Whether a model of this config reads pictures beside text."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN,
    )

    return config.model_type in KNOWN and hasattr(config, "vision_config")


def model_class(config: Any) -> Any:
    """transformers' class that opens such models, with their heads."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if sees(config) else AutoModelForCausalLM


def _ends(model: str, trust_remote_code: bool) -> list[int]:
    """The ids at which ``generate`` would stop. Raises: ModelError: no such model."""
    from transformers import GenerationConfig

    generation: Any = GenerationConfig
    config = config_of(model, trust_remote_code)
    try:
        given = generation.from_pretrained(model).eos_token_id
    except OSError:  # It has no file of these, which is usual.
        given = None
    except Exception as cause:
        raise _cannot_open(model, cause) from cause
    of_text = config.get_text_config()
    for ends in (given, *(getattr(one, "eos_token_id", None) for one in (config, of_text))):
        if ends is not None:
            return [ends] if isinstance(ends, int) else list(ends)
    return []


def config_of(model: str, trust_remote_code: bool = False) -> Any:
    """transformers' config. Raises: ModelError: no such model."""
    from transformers import AutoConfig

    configs: Any = AutoConfig
    base, _ = layers_of(model)
    try:
        return configs.from_pretrained(base, trust_remote_code=trust_remote_code)
    except Exception as cause:
        raise _cannot_open(model, cause) from cause


def bare(config: Any, trust_remote_code: bool = False) -> Any:
    """A model without values, on torch's meta device: its layers and their shapes.

    Raises:
        ModelError: there is no such architecture.
    """
    import torch

    try:
        with torch.device("meta"):
            return model_class(config).from_config(config, trust_remote_code=trust_remote_code)
    except Exception as cause:
        raise _cannot_open(config.name_or_path, cause) from cause


def placeholder_of(model: str) -> int | None:
    """The id that stands for an image; None if it reads none. Raises: ModelError: no such model."""
    return getattr(config_of(model), "image_token_id", None)


def same_vocabulary(model: str, other: str) -> None:
    """Raises: ModelError: the two cannot be compared token by token, or cannot be opened."""
    sizes = vocabulary_size(model), vocabulary_size(other)
    if open_tokens(model).fingerprint != open_tokens(other).fingerprint or sizes[0] != sizes[1]:
        raise ModelError(
            f"the teacher {other!r} has another vocabulary ({sizes[1]} tokens) than {model!r} "
            f"({sizes[0]}): their distributions cannot be compared; learn from its text instead "
            "(imitation, rise, adversarial)"
        )


def vocabulary_size(model: str) -> int:
    """How many logits it has. Raises: ModelError: it cannot be opened."""
    return int(config_of(model).get_text_config().vocab_size)


def unready(model: str, trust_remote_code: bool = False, elsewhere: bool = False) -> str:
    """Why ``model`` cannot be opened, as far as that shows without its weights; empty if it can.

    ``elsewhere``: others look at its pictures.
    """
    try:
        config_of(model, trust_remote_code)
        open_tokens(model, trust_remote_code, placeholder_of(model) if elsewhere else None)
    except ModelError as error:
        return str(error)
    return ""


def device_of(device: str) -> str:
    """torch's name of ``auto``, or of any other. Raises: PolicyError: there is no such device."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise PolicyError(f"device {device} was asked for, but torch sees no GPU; use auto or cpu")
    return device


def open_weights(
    model: str,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    beside: bool = True,
    quantization: Quantization = "none",
) -> Any:
    """The same without the tokenizer, as learners export it; ``beside``: as in ``merge``."""
    from transformers.utils import logging as transformers_logging

    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    device = device_of(device)
    base, adapters = layers_of(model)
    config = config_of(base, trust_remote_code)
    models = model_class(config)
    quantised = quantization != "none"
    more = arguments(bare(config, trust_remote_code), device) if quantised else {}
    try:
        weights, report = models.from_pretrained(
            base,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **more,
        )
    # Not narrower: a damaged file is a plain Exception to tokenizers and to safetensors.
    except Exception as cause:
        raise _cannot_open(model, cause) from cause
    if report["missing_keys"]:
        # They would have been filled with random numbers.
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"the model {model!r} is incomplete: {len(missing)} tensors are not in its files, such "
            f"as {missing[0]}"
        )
    weights = weights.to(device)
    if quantised:
        steady(weights)
    for adapter in adapters:
        merge(weights, adapter, base, beside)
        base = str(adapter)
    if device.startswith("cuda"):
        from .wide import widen

        widen(weights)
    return weights


def save_merged(model: str, folder: Path, trust_remote_code: bool = False) -> None:
    """Write what ``open_model`` opens as a model of its own, with its tokenizer.

    In the dtype of the base, as those who sample from it and its adapters see it: in float32 every
    later reader would need twice the memory, and play what was never evaluated.
    """
    open_weights(model, "cpu", "auto", trust_remote_code, beside=False).save_pretrained(folder)
    open_tokens(model, trust_remote_code).save(folder)


def _cannot_open(model: str, cause: Exception) -> ModelError:
    first = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
    if model.startswith(("/", "./", "../", "~")) and not Path(model).exists():
        first = "there is no such folder"  # To the hub it would be a name that is spelt wrong.
    return ModelError(
        f"cannot open the model {model!r}: {first.rstrip('.')}; give a model folder, a hub id, or "
        "scratch:WIDTHxLAYERS"
    )
