"""A LoRA on a model's layers."""

# peft is partly untyped.
# pyright: reportUnknownMemberType=false

import re
from typing import Any

from ...core.errors import LearnerError
from .config import LearnerConfig


def adapted(weights: Any, config: LearnerConfig, name: str, language: bool) -> Any:
    """peft's model around ``weights``, called ``name``; its random numbers are the caller's.

    ``language``: only on the layers of its language model.

    Raises:
        LearnerError: it has no such layers.
    """
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules="all-linear" if config.targets == "vision" else config.targets,
        exclude_modules=_other_than_language(weights) if language else None,
        task_type="CAUSAL_LM",
    )
    try:
        model: Any = get_peft_model(weights, settings, autocast_adapter_dtype=True)
    except ValueError as cause:
        raise LearnerError(
            f"no LoRA can be put on {name!r} ({type(weights).__name__}) with "
            f"learner.targets: {config.targets}: {cause}"
        ) from cause
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            # Autocast sees to it; peft would copy every input to float32, and autocast back.
            module.cast_input_dtype_enabled = False
    return model


def beside_language(weights: Any) -> list[Any]:
    """The weights that are not the language model's own: those of what looks at pictures."""
    parts = (weights.get_decoder(), weights.get_output_embeddings())
    language = {id(weight) for part in parts for weight in part.parameters()}
    return [weight for weight in weights.parameters() if id(weight) not in language]


def _other_than_language(weights: Any) -> str:
    """A regular expression of the layers that get no LoRA."""
    decoder = weights.get_decoder()
    name = next(name for name, module in weights.named_modules() if module is decoder)
    return rf"(?!{re.escape(name)}\.).*"
