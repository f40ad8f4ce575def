"""Whether a model is to be sharded over several processes."""

import os

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
