"""AdamW, and weights in training with what it remembers of them, in one file.

torch is imported when called.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ..errors import ModelError

Kind: TypeAlias = Literal["adamw", "adamw_8bit"]


def adamw(weights: Iterable[Any], kind: Kind, learning_rate: float, weight_decay: float) -> Any:
    """One that has seen nothing. torch's; with ``adamw_8bit`` that of bitsandbytes.

    The latter keeps both moments of tensors of 4,096 numbers or more in 8 bits, in blocks of 256
    with a scale each (Dettmers et al. 2022, arXiv:2110.02861).
    """
    if kind == "adamw":
        from torch.optim import AdamW

        return AdamW(weights, lr=learning_rate, weight_decay=weight_decay, fused=True)
    from bitsandbytes.optim.adamw import AdamW8bit  # pyright: ignore[reportMissingTypeStubs]

    untyped: Any = AdamW8bit
    return untyped(list(weights), lr=learning_rate, weight_decay=weight_decay)


def state_of(weights: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """``weight.NAME`` and ``optimizer.SLOT.NAME`` of each of the weights.

    Where they are sharded, every process has to ask.
    """
    import torch

    state: dict[str, Any] = {}
    for name, weight in weights.items():
        state[f"weight.{name}"] = whole(weight.detach())
        for slot, value in sorted(optimizer.state.get(weight, {}).items()):
            state[f"optimizer.{slot}.{name}"] = whole(torch.as_tensor(value))
    return state


def write(file: Path, state: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

    save_file({key: value.contiguous().cpu().clone() for key, value in state.items()}, file)


def read(file: Path, only: str = "") -> dict[str, Any]:
    """The tensors of a file, or of that name only, if it is there.

    Raises:
        ModelError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

    opener: Any = safe_open
    try:
        if only:
            with opener(file, "pt") as opened:
                return {only: opened.get_tensor(only)} if only in {*opened.keys()} else {}
        return load_file(file)
    except (OSError, SafetensorError) as cause:
        raise ModelError(f"cannot read {file}: {cause}") from cause


def restore(file: Path, weights: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """``take`` what is in a file; all of it.

    Raises:
        ModelError: the file is missing, damaged or of other weights.
    """
    state = read(file)
    try:
        take(state, weights, optimizer)
    except ModelError as cause:
        raise ModelError(f"{file}: {cause}") from None
    return state


def take(state: Mapping[str, Any], weights: Mapping[str, Any], optimizer: Any) -> None:
    """Make ``weights`` and ``optimizer`` what ``state_of`` found.

    Raises:
        ModelError: it was found of others; nothing is changed then.
    """
    import torch

    begin = "weight."
    shapes = {k.removeprefix(begin): v.shape for k, v in state.items() if k.startswith(begin)}
    if shapes != {name: weight.shape for name, weight in weights.items()}:
        raise ModelError(
            f"it holds {len(shapes)} trained tensors, and here are {len(weights)}, or they are of "
            "other shapes: it was written with another model or config"
        )
    # In an order that all processes share: what is sharded is put together by all at once.
    slots = sorted({key.split(".")[1] for key in state if key.startswith("optimizer.")})
    if slots and ("exp_avg" in slots) != isinstance(optimizer, torch.optim.AdamW):
        raise ModelError("it was written with another optimiser (learner.optimizer)")
    # torch counts steps on the CPU, unless they are counted where the weights are.
    there = any(group.get("fused") for group in optimizer.param_groups)
    for name, weight in weights.items():
        with torch.no_grad():
            weight.copy_(like(state[f"weight.{name}"], weight))
        where = weight.device if there else "cpu"
        optimizer.state[weight] = {
            slot: _count(value, where) if slot == "step" else like(value, weight)
            for slot in slots
            if (value := state.get(f"optimizer.{slot}.{name}")) is not None
        }


def _count(value: Any, device: Any) -> Any:
    """A count of steps as its optimiser keeps it: bitsandbytes counts in plain whole numbers."""
    return value.to(device) if value.is_floating_point() else int(value)


def whole(value: Any) -> Any:
    """All of a tensor; where it is sharded, every process has to ask."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Any, weight: Any) -> Any:
    """This process's part of ``value``, where ``weight`` is sharded and as large."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(weight, DTensor) and value.shape == weight.shape:
        place, how = weight.device_mesh, weight.placements
        return distribute_tensor(value.to(weight.device), place, how, src_data_rank=None)
    return value.to(weight.device)
