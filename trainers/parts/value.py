"""What a state is worth: the backbone with a LoRA and one number on top."""

# torch is partly untyped.
# pyright: reportUnknownMemberType=false

import random
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from ...core.models.scalar import ScalarConfig, ScalarModel
from ...core.seeds import derive
from ...core.types import Completion, Prompt


class ValueConfig(ScalarConfig):
    epochs: int = Field(default=1, ge=1)
    """Passes over an iteration's states."""


class Value:
    """V(state), where a state is the prompt that the policy answers."""

    def __init__(self, config: ValueConfig, model: str, seed: int) -> None:
        """Raises: ModelError, PolicyError: the model cannot be opened."""
        self._config = config
        self._seed = seed
        self.net = ScalarModel(config, model, seed)

    def values(self, prompts: Sequence[Prompt]) -> list[float]:
        return self.net.values([(prompt, Completion("")) for prompt in prompts])

    def learn(
        self,
        prompts: Sequence[Prompt],
        returns: Sequence[float],
        weights: Sequence[float],
        side: Literal["both", "above"],
    ) -> float:
        """Towards ``returns``: the mean of weight * (R - V)^2 / 2 before each step.

        ``above``: only from below, as self-imitation has it: (R - V)_+ in place of R - V.
        """
        rows = [self.net.ids((prompt, Completion(""))) for prompt in prompts]
        total = 0.0
        for epoch in range(self._config.epochs):
            order = list(range(len(rows)))
            random.Random(derive(self._seed, "value", self.net.updates, epoch)).shuffle(order)
            size = self._config.batch_size
            for begin in range(0, len(order), size):
                chunk = sorted(order[begin : begin + size], key=lambda k: len(rows[k]))
                self.net.clear()
                moves = False
                for part in self.net.parts(chunk, rows):
                    wanted = torch.tensor([returns[k] for k in part])
                    count = torch.tensor([weights[k] for k in part])
                    values = self.net.forward([rows[k] for k in part])
                    gap = wanted.to(values.device) - values
                    loss = 0.5 * count.to(values.device) * value_gap(gap, side).square()
                    (loss.sum() / len(chunk)).backward()
                    total += float(loss.detach().sum())
                    moves = moves or bool(loss.detach().any())
                if moves:  # Momentum alone is no reason to.
                    self.net.step()
        return total / (self._config.epochs * max(1, len(rows)))


def value_gap(gap: torch.Tensor, side: Literal["both", "above"]) -> torch.Tensor:
    """What is squared: R - V, or its positive part."""
    return gap.clip(min=0) if side == "above" else gap
