"""A model sharded over several processes: whether it is to be, and its tensors whole or in part."""

import os

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from ...core.errors import LearnerError


def sharding() -> bool:
    """Whether `accelerate launch` was told to shard the model over its processes.

    Raises:
        LearnerError: by the first version of FSDP.
    """
    # Asked here, for accelerate itself knows no FSDP without a GPU.
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise LearnerError(
            f"accelerate is set to fsdp_version {version}; wanted 2, as in "
            "recipes/accelerate/fsdp2.yaml"
        )
    # Else transformers opens models with random weights in all processes but one, for accelerate
    # to fill later; here each of them shards a whole one.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return True


def whole(value: Tensor) -> Tensor:
    """All of a tensor; where it is sharded, every process has to ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Tensor, weight: Tensor) -> Tensor:
    """This process's part of ``value``, where ``weight`` is sharded and as large."""
    if isinstance(weight, DTensor) and value.shape == weight.shape:
        place, how = weight.device_mesh, weight.placements
        return distribute_tensor(value.to(weight.device), place, how, src_data_rank=None)
    return value.to(weight.device)
