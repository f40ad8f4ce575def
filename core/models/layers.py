"""What kinds of layers a model has. transformers is imported when called."""

# transformers' types are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from typing import Any

ATTENTION = {"full_attention", "sliding_attention"}
"""Layers whose keys and values may stand in any column, or be of another conversation's row."""


def kinds_of(model: Any) -> set[str]:
    """What its layers are, as transformers calls them."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    kinds: list[str] = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))[0]
    return set(kinds)


def attends_only(model: Any) -> bool:
    """Whether all that it keeps is keys and values, so that rows may be padded and remembered.

    Others also keep states, of which every token is a part for good.
    """
    return kinds_of(model) <= ATTENTION
