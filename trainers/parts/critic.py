"""A bounded function of state and action that seeks where the policy differs from its teacher."""

# torch is partly untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field
from safetensors.torch import (
    load_file,  # pyright: ignore[reportUnknownVariableType]
    save_file,  # pyright: ignore[reportUnknownVariableType]
)
from torch import Tensor

from ...core.config import Config
from ...core.seeds import derive


class CriticConfig(Config):
    learning_rate: float = Field(default=1e-3, gt=0)
    width: int = Field(default=128, ge=1)
    """Hidden units."""


class Critic:
    """f(s, .) = tanh(W2 relu(W1 s)): what the policy's head reads in, a value per token out.

    Made once it is known how wide states and vocabulary are. At first it is 0 everywhere.
    """

    def __init__(self, config: CriticConfig, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._weights: list[Tensor] = []
        self._optimizer: torch.optim.AdamW | None = None

    def meet(self, states: int, vocabulary: int, device: torch.device | str) -> list[Tensor]:
        """Its weights, there; made now if they are not yet."""
        if not self._weights:
            random = torch.Generator().manual_seed(derive(self._seed, "critic"))
            width = self._config.width
            first = torch.randn(width, states, generator=random) / states**0.5
            self._take(first, torch.zeros(vocabulary, width))
        if self._weights[0].device != torch.device(device):
            moved = [weight.detach().to(device) for weight in self._weights]
            self._take(*moved, kept=self._slots())
        return self._weights

    def __call__(self, states: Tensor) -> Tensor:
        """(N, D) to (N, V), in [-1, 1]."""
        first, second = self._weights
        return torch.tanh(torch.relu(states @ first.T) @ second.T)

    def climb(self) -> None:
        """One step along the gradients, which are of the negative of what is to grow."""
        if self._optimizer is not None:
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

    def _take(self, *weights: Tensor, kept: Sequence[dict[str, Tensor]] = ({}, {})) -> None:
        """These weights from now on, and what an optimiser remembers of each."""
        self._weights = [weight.requires_grad_() for weight in weights]
        self._optimizer = torch.optim.AdamW(
            self._weights, lr=self._config.learning_rate, weight_decay=0
        )
        for weight, slots in zip(self._weights, kept, strict=True):
            if slots:
                self._optimizer.state[weight] = {
                    name: value if name == "step" else value.to(weight.device)
                    for name, value in slots.items()
                }

    def _slots(self) -> list[dict[str, Tensor]]:
        if self._optimizer is None:
            return []
        return [dict(self._optimizer.state.get(weight, {})) for weight in self._weights]

    def save(self, file: Path) -> None:
        state = {f"weight.{k}": w.detach().cpu().clone() for k, w in enumerate(self._weights)}
        for k, slots in enumerate(self._slots()):
            state |= {f"optimizer.{name}.{k}": v.cpu().clone() for name, v in slots.items()}
        save_file(state, file)

    def restore(self, file: Path) -> None:
        state = load_file(file)
        if "weight.0" not in state:
            return
        names = ("step", "exp_avg", "exp_avg_sq")
        kept = [
            {name: state[key] for name in names if (key := f"optimizer.{name}.{k}") in state}
            for k in range(2)
        ]
        self._take(state["weight.0"], state["weight.1"], kept=kept)
