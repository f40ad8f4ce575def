"""LoRA (Hu et al. 2021, arXiv:2106.09685) on a model's layers. peft is imported when asked for."""

# peft is partly untyped.
# pyright: reportUnknownMemberType=false

import re
from collections.abc import Sequence
from typing import Any

from ..errors import ModelError


def with_lora(
    weights: Any,
    rank: int,
    alpha: int,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
    language_only: bool = False,
) -> Any:
    """peft's model around ``weights``, whose own are frozen; its random numbers are the caller's.

    Args:
        targets: the last parts of the names of the layers that get one, or ``all-linear``.
        language_only: only on the layers of its language model, not of what looks at pictures.

    Raises:
        ModelError: it has no such layers.
    """
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=_other_than_language(weights) if language_only else None,
        task_type="CAUSAL_LM",
    )
    try:
        model: Any = get_peft_model(weights, settings, autocast_adapter_dtype=True)
    except ValueError as cause:
        raise ModelError(f"no LoRA can be put on {type(weights).__name__}: {cause}") from cause
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            # Autocast sees to it; peft would copy every input to float32, and autocast back.
            module.cast_input_dtype_enabled = False
    return model


def _other_than_language(weights: Any) -> str:
    """A regular expression of the layers that get none."""
    decoder = weights.get_decoder()
    name = next(name for name, module in weights.named_modules() if module is decoder)
    return rf"(?!{re.escape(name)}\.).*"
