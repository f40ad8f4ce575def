"""Attention over rows that begin alike, what they share standing once; and over grouped heads.

Registered with transformers under ``NAME``, for models of plain attention. transformers' ``sdpa``
copies the keys and values of grouped heads out to every head as soon as there is a mask, which on a
CPU takes ten times as long as the attention itself.
"""

# torch's and transformers' types are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from ...core.models.layers import attends_only
from .cache import RoomyLayer

NAME = "selfwright_shared"
_reading: ContextVar[Sequence[Any]] = ContextVar("reading", default=())
"""The cache's layers of the forward pass at hand."""


def attend(model: Any) -> bool:
    """Have ``model`` attend so; whether it can."""
    if not (attends_only(model) and plain(model)):
        return False
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.config.get_text_config(decoder=True)._attn_implementation = NAME
    return True


def forgo(model: Any) -> None:
    """Have ``model`` attend as transformers does."""
    model.config.get_text_config(decoder=True)._attn_implementation = "sdpa"


def plain(model: Any) -> bool:
    """Whether bool masks may be given ready-made, which spares making them anew for every token.

    Other kinds of attention want other masks, and a model with sliding windows wants two.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or ("sliding_attention",)
    slides = getattr(config, "sliding_window", None) and "sliding_attention" in kinds
    return config._attn_implementation in ("sdpa", NAME) and not slides


def shares(model: Any) -> bool:
    """Whether what rows have in common may stand once for all of them."""
    return model.config.get_text_config(decoder=True)._attn_implementation == NAME


@contextmanager
def reading(layers: Sequence[Any]) -> Generator[None]:
    """For a forward pass with these layers as its cache."""
    token = _reading.set(layers)
    try:
        yield
    finally:
        _reading.reset(token)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """(B, Q, H, D) from (B, H, Q, D) queries and (B, K, T, D) keys and values, K dividing H.

    ``attention_mask``: (B or 1, 1, Q, T) bool, over the rows' own columns; what they share is seen
    by all.

    Raises:
        ValueError: the keys are not those of the cache, so what stands before them is unknown.
    """
    shared = _shared_before(module, key)
    if shared is not None and query.shape[2] == 1 and others.get("position_bias") is None:
        return _merged(query, key, value, attention_mask, scaling, *shared), None
    if shared is not None:
        rows, length = len(key), shared[0].shape[2]
        key, value = (
            torch.cat((one.expand(rows, -1, -1, -1), own), 2)
            for one, own in zip(shared, (key, value), strict=True)
        )
        assert attention_mask is not None, "queries after something shared come with a mask"
        attention_mask = torch.nn.functional.pad(attention_mask, (length, 0), value=True)
    grouped = query.shape[1] != key.shape[1] and query.device.type == "cpu"
    if attention_mask is None or not grouped or others.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


def _shared_before(module: Any, key: Tensor) -> tuple[Tensor, Tensor] | None:
    layers = _reading.get()
    # All of them share something, or none.
    if not layers or getattr(layers[0], "shared", None) is None:
        return None
    layer = layers[module.layer_idx]
    if not isinstance(layer, RoomyLayer) or layer.keys is not key:
        raise ValueError("the model attends to other keys than those in its cache")
    return layer.shared


def _merged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    shared_key: Tensor,
    shared_value: Tensor,
) -> Tensor:
    """One query a row: one product for all rows with what they share, one for each with its own."""
    rows, heads, _, width = query.shape
    groups, length = key.shape[1], shared_key.shape[2]
    each = heads // groups
    query = query.view(rows, groups, each, width) * (scaling or width**-0.5)
    own = query @ key.transpose(2, 3)  # (B, K, H/K, T)
    if mask is not None:
        own = own.masked_fill(~mask, -torch.inf)
    folded = query.transpose(0, 1).reshape(groups, rows * each, width)
    common = (folded @ shared_key[0].transpose(1, 2)).view(groups, rows, each, length)
    weights = torch.cat((common.transpose(0, 1), own), -1).float().softmax(-1).to(value.dtype)
    before = weights[..., :length].transpose(0, 1).reshape(groups, rows * each, length)
    out = (before @ shared_value[0]).view(groups, rows, each, -1).transpose(0, 1)
    return (out + weights[..., length:] @ value).reshape(rows, 1, heads, -1)
