"""How much memory an update would take for what layers keep for their gradients, and is there."""

# torch is partly untyped.
# pyright: reportUnknownMemberType=false

from contextlib import suppress
from pathlib import Path

import psutil
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .attention import BLOCK
from .pack import Row, Span
from .reader import Reader

PROBES = {"cpu": 128, "cuda": 4 * BLOCK}
"""Tokens of the longer one of two rows that are tried, by the kind of device."""
SHARE = 0.7
"""So much of what is free may be taken: other things come and go in an update."""


def fits(reader: Reader) -> bool:
    """Whether a full micro-batch's activations would have room where the model is."""
    return per_token(reader) * reader.budget <= SHARE * free(reader.device)


def per_token(reader: Reader) -> float:
    """Bytes that layers keep for the gradients of a token more; tried on two short rows."""
    tokens = PROBES.get(reader.device.type, PROBES["cpu"])
    return 2 * (_kept(reader, tokens) - _kept(reader, tokens // 2)) / tokens


def _kept(reader: Reader, tokens: int) -> int:
    """Bytes kept for the gradients of a row of so many, weights aside."""
    ids = (reader.usual() * tokens)[:tokens]
    layout = reader.layout([Row(ids, spans=[Span(1, 2, 0.0, (), -1)])])
    mine = {weight.untyped_storage().data_ptr() for weight in reader.model.parameters()}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in mine:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with saved_tensors_hooks(keep, lambda value: value):
        found = reader.states(layout)  # Held meanwhile, so that no place is used twice.
    del found
    return sum(kept.values())


def free(device: torch.device) -> int:
    """Bytes to be had there."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    room = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")  # A container's, whose limit psutil does not see.
    with suppress(OSError, ValueError, KeyError):
        used = int((group / "memory.current").read_text())
        # Files that were read and that nobody needs are counted, and go when memory is wanted.
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= int(stat["inactive_file"])
        room = min(room, int((group / "memory.max").read_text()) - used)
    return room
