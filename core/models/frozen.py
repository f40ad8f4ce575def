"""Weights that nobody writes to, held once for all in this process who read them.

torch is imported when called.
"""

import copy
import threading
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from .open import device_of, open_tokens, open_weights
from .origin import digest, layers_of
from .quantization import Quantization
from .tokens import ChatTokens

_held: WeakValueDictionary[tuple[Any, ...], Any] = WeakValueDictionary()
_turn = threading.Lock()


def open_frozen(
    model: str,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    quantization: Quantization = "none",
) -> tuple[Any, ChatTokens]:
    """As ``open_model``, but whoever asks for the same gets modules of their own on shared tensors.

    Adapters and hooks may be put on the modules; the tensors are not to be written to, and need no
    gradient. They go once nobody holds any of the modules.

    Raises:
        ModelError, PolicyError: as ``open_model``.
    """
    import torch

    device = device_of(device)
    if device == "cuda":
        device = f"cuda:{torch.cuda.current_device()}"
    base, adapters = layers_of(model)
    # A folder may be written anew.
    content = digest(model) if Path(base).is_dir() else None
    key = (base, *adapters, content, device, dtype, quantization)
    with _turn:
        whole = _held.get(key)
        if whole is None:
            whole = open_weights(
                model, device, dtype, trust_remote_code, quantization=quantization
            ).requires_grad_(False)
            _held[key] = whole
        mine: Any = _on_same_tensors(whole)
    return mine, open_tokens(model, trust_remote_code)


def _on_same_tensors(whole: Any) -> Any:
    """A copy of the modules, that keeps ``whole`` for as long as it is there itself."""
    mine = copy.deepcopy(whole, {id(t): t for t in (*whole.parameters(), *whole.buffers())})
    mine.__dict__["_whole"] = whole  # Not as a module inside: it would be a part of the model then.
    return mine
