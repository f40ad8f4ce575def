"""What TRL's trainers work on: rows in which pictures stand, and nothing that others will miss."""

# torch is partly untyped.
# pyright: reportUnknownMemberType=false

import random
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ...core.models.tokens import PAD
from ...core.models.vision import Eye
from ...core.types import Image


def collated(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of ``input_ids`` and ``labels``, padded on the right, with each one's ``row``."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(values: Sequence[int], by: int) -> list[int]:
        return [*values, *[by] * (longest - len(values))]

    return {
        "input_ids": torch.tensor([padded(row["input_ids"], PAD) for row in rows]),
        "labels": torch.tensor([padded(row["labels"], -100) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row["labels"]), 0) for row in rows]),
        "row": torch.tensor([row["row"] for row in rows]),
    }


def seeing(trainer: Any, eye: Eye, images: Sequence[tuple[Image, ...]]) -> Any:
    """The class ``trainer``, whose model is given what the eye makes of each row's ``images``."""

    class Seeing(trainer):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            usual: Any = super()
            usual.__init__(*arguments, **named)
            # Some say that they do not, and pass it on all the same: how many tokens a whole step
            # trains, without which each micro-batch would weigh the same.
            self.model_accepts_loss_kwargs = True

        def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
            # Here, as what it is given of pictures would not come through a data loader whole.
            usual: Any = super()
            ready = dict[str, Any](usual._prepare_inputs(inputs))
            rows: list[int] = ready.pop("row").tolist()
            shown = [images[k] for k in rows]
            with torch.no_grad():
                given = eye.given(ready["input_ids"], shown, ready["attention_mask"].bool())
            return {**ready, **given}

    return Seeing


@contextmanager
def apart() -> Generator[str]:
    """A folder for a while. The random states that TRL seeds anew are put back in the end."""
    rng: Any = torch.random
    python, arrays = random.getstate(), np.random.get_state()
    with rng.fork_rng(), tempfile.TemporaryDirectory(prefix="selfwright-") as folder:
        try:
            yield folder
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


@contextmanager
def own_forward(*modules: Any) -> Generator[None]:
    """Whatever is put over the modules' ``forward`` meanwhile is taken off again."""
    kept: list[Any] = [vars(module).get("forward") for module in modules]
    try:
        yield
    finally:
        for module, forward in zip(modules, kept, strict=True):
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward
