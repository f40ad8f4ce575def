"""Which layers a LoRA may be put on, by the names that recipes give them."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator

from ...core.models.adapters import tied_weight
from ...core.plugins import nearest


def _named(targets: list[str] | str) -> list[str] | str:
    if not targets:
        raise ValueError("wanted the name of a layer at least, or all-linear")
    if isinstance(targets, list) and "all-linear" in targets:
        raise ValueError("all-linear stands alone: targets: all-linear")
    return targets


Targets: TypeAlias = Annotated[list[str] | Literal["all-linear", "vision"], AfterValidator(_named)]
"""The last parts of layers' dotted names; or all linear ones but the output layer."""


def unknown_targets(targets: Sequence[str], model: Any) -> list[str]:
    """What is wrong with ``targets``, each the end of layers' dotted names, in this model."""
    import torch
    from transformers.pytorch_utils import Conv1D

    kinds = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv2d, Conv1D)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}
    last = sorted({name.rpartition(".")[2] for name in layers})
    tied = tied_weight(model)
    faults: list[str] = []
    for target in targets:
        found = [layer for name, layer in layers.items() if f".{name}".endswith(f".{target}")]
        if not target or not found:
            there = f"the model has {', '.join(last)}"
            near = nearest(target, last)
            near = f"{near} " if near.startswith("did") else ""
            faults.append(f"learner.targets: no layer is called {target!r}; {near}{there}")
        elif any(layer.weight is tied for layer in found):
            message = (
                "shares its weights with the embeddings (or they with it), which no policy loads"
            )
            faults.append(f"learner.targets: {target!r} {message}; leave it out")
    return faults
