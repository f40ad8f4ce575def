"""Frozen weights in 4 bits, by bitsandbytes: QLoRA (Dettmers et al. 2023, arXiv:2305.14314).

NF4 with double quantisation, as in the paper; adapters are computed beside it, never merged into
it. Departs: the paper pages its optimiser's memory out of a full GPU; here it stays.

torch, transformers and bitsandbytes are imported when called.
"""

from importlib.util import find_spec
from typing import Any, Literal, TypeAlias

from ..errors import ModelError

Quantization: TypeAlias = Literal["none", "nf4"]
MISSING = "needs bitsandbytes, which is not installed: pip install 'selfwright[qlora]'"


def installed() -> bool:
    return find_spec("bitsandbytes") is not None


def arguments(bare: Any, device: str) -> dict[str, Any]:
    """What transformers' ``from_pretrained`` is given to open such a model in 4 bits on ``device``.

    ``bare``: the model without values. The linear layers of its language model's body are taken;
    embeddings, the head and what looks at pictures stay as they are.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    if not installed():
        raise ModelError(f"quantization: nf4 {MISSING}")
    import torch
    from transformers import BitsAndBytesConfig

    body = {id(module) for module in bare.get_decoder().modules()}
    left = [
        name
        for name, module in bare.named_modules()
        if isinstance(module, torch.nn.Linear) and id(module) not in body
    ]
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=left,
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def steady(model: Any) -> None:
    """Have the 4-bit layers of ``model`` compute the same at all times, in the dtype of the rest.

    On CPUs with AVX512-BF16, bitsandbytes would pack weights anew when they first answer outside of
    training, and compute in bfloat16 from then on: neither would sampler and learner agree then,
    nor could the packed weights be learned through.

    Raises:
        ModelError: it has no such layers.
    """
    from bitsandbytes.nn.modules import Linear4bit  # pyright: ignore[reportMissingTypeStubs]

    layers: list[Any] = [module for module in model.modules() if isinstance(module, Linear4bit)]
    if not layers:
        raise ModelError(
            f"quantization: nf4 found no linear layer in the body of {type(model).__name__}; "
            "wanted quantization: none"
        )
    for layer in layers:
        layer.compute_dtype = model.dtype
        layer.support_avx512bf16_for_cpu = False
