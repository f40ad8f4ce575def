"""Opens language models from disk or hub, safetensors only. torch is imported when called."""

import logging
from pathlib import Path
from typing import Any

from .errors import ModelError, PolicyError
from .files import read_json
from .tokens import ChatTokens

ADAPTER = "adapter_config.json"


def parts_of(model: str) -> tuple[str, Path | None]:
    """The base of what is called ``model``, and the folder of the adapter on it, if there is one.

    ``model``: a hub id, a model's folder, an adapter's, a run's checkpoint or the run itself.
    """
    for folder in (Path(model), Path(model) / "checkpoint"):
        if (folder / ADAPTER).is_file():
            inside = folder / "base"
            named = read_json(folder / ADAPTER)["base_model_name_or_path"]
            return str(inside) if inside.is_dir() else named, folder
        if (folder / "config.json").is_file():
            return str(folder), None
    return model, None


def open_model(
    model: str, device: str, dtype: str, trust_remote_code: bool
) -> tuple[Any, ChatTokens]:
    """Weights and tokenizer of what ``parts_of`` knows, safetensors only; an adapter is merged.

    Raises:
        ModelError: it is not there, is damaged or incomplete, or is no causal language model with
            a chat template.
        PolicyError: there is no such device.
    """
    weights = open_weights(model, device, dtype, trust_remote_code)
    return weights, open_tokens(model, trust_remote_code)


def open_tokens(
    model: str, trust_remote_code: bool = False, placeholder: int | None = None
) -> ChatTokens:
    """The tokenizer alone; ``placeholder``: as in ``ChatTokens``. Raises: ModelError: as above."""
    # Untyped: their from_pretrained is only partly known to a type checker.
    from transformers import AutoTokenizer

    tokenizers: Any = AutoTokenizer
    model, _ = parts_of(model)
    try:
        tokenizer = tokenizers.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as cause:
        raise _cannot_open(model, cause) from cause
    return ChatTokens(tokenizer, placeholder=placeholder, ends=_ends(model, trust_remote_code))


def _ends(model: str, trust_remote_code: bool) -> list[int]:
    """The ids at which ``generate`` would stop. Raises: ModelError: no such model."""
    from transformers import AutoConfig, GenerationConfig

    configs: Any = AutoConfig
    generation: Any = GenerationConfig
    try:
        config = configs.from_pretrained(model, trust_remote_code=trust_remote_code)
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


def placeholder_of(model: str) -> int | None:
    """The id that stands for an image; None if it reads none. Raises: ModelError: no such model."""
    from transformers import AutoConfig

    configs: Any = AutoConfig
    model, _ = parts_of(model)
    try:
        return getattr(configs.from_pretrained(model), "image_token_id", None)
    except Exception as cause:
        raise _cannot_open(model, cause) from cause


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
    from transformers import AutoConfig

    base, _ = parts_of(model)
    configs: Any = AutoConfig
    try:
        config = configs.from_pretrained(base)
    except Exception as cause:
        raise _cannot_open(model, cause) from cause
    return int(config.get_text_config().vocab_size)


def open_weights(model: str, device: str, dtype: str, trust_remote_code: bool) -> Any:
    """The same without the tokenizer, as learners export it."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise PolicyError(f"device {device} was asked for, but torch sees no GPU; use auto or cpu")
    models: Any = AutoModelForCausalLM
    base, adapter = parts_of(model)
    try:
        weights, report = models.from_pretrained(
            base,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
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
    return (_merged(weights, adapter) if adapter else weights).to(device)


def save_merged(model: str, folder: Path) -> None:
    """Write what ``open_model`` opens as a model of its own, with its tokenizer."""
    weights, tokens = open_model(model, "cpu", "auto", False)
    weights.save_pretrained(folder)
    tokens.tokenizer.save_pretrained(folder)


def _merged(weights: Any, adapter: Path) -> Any:
    from peft import PeftModel

    if not (adapter / "adapter_model.safetensors").is_file():
        raise ModelError(f"{adapter} holds no adapter_model.safetensors")
    try:
        return PeftModel.from_pretrained(weights, adapter).merge_and_unload()  # pyright: ignore
    except Exception as cause:
        raise _cannot_open(str(adapter), cause) from cause


def _cannot_open(model: str, cause: Exception) -> ModelError:
    first = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
    return ModelError(
        f"cannot open the model {model!r}: {first.rstrip('.')}; give a model folder, a hub id, or "
        "scratch:WIDTHxLAYERS"
    )
