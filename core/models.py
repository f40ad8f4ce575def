"""Opens language models from disk or hub, safetensors only. torch is imported when called."""

import logging
from typing import Any

from .errors import PolicyError
from .tokens import ChatTokens


def open_model(
    model: str, device: str, dtype: str, trust_remote_code: bool
) -> tuple[Any, ChatTokens]:
    """Weights and tokenizer of a folder or hub id, safetensors only.

    Raises:
        PolicyError: it is not there, or is no causal language model with a chat template.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        weights: Any = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError) as cause:
        first = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise PolicyError(
            f"cannot open the model {model!r}: {first}; give a model folder, a hub id, or "
            "scratch:WIDTHxLAYERS"
        ) from cause
    return weights.to(device), ChatTokens(tokenizer)
