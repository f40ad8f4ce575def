"""A bounded function of state and action that seeks where the policy differs from its teacher."""

# torch is partly untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from pathlib import Path

import torch
from pydantic import Field
from safetensors.torch import (
    load_file,  # pyright: ignore[reportUnknownVariableType]
    save_file,  # pyright: ignore[reportUnknownVariableType]
)
from torch import Tensor

from ..core.config import Config
from ..core.seeds import derive


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

    def meet(self, states: int, vocabulary: int) -> list[Tensor]:
        """Its weights, made now if they are not there yet."""
        if not self._weights:
            random = torch.Generator().manual_seed(derive(self._seed, "critic"))
            width = self._config.width
            first = torch.randn(width, states, generator=random) / states**0.5
            self._take(first, torch.zeros(vocabulary, width))
        return self._weights

    def __call__(self, states: Tensor) -> Tensor:
        """(N, D) to (N, V), in [-1, 1]."""
        first, second = (weight.to(states.device) for weight in self._weights)
        return torch.tanh(torch.relu(states @ first.T) @ second.T)

    def climb(self) -> None:
        """One step along the gradients, which are of the negative of what is to grow."""
        if self._optimizer is not None:
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

    def _take(self, *weights: Tensor) -> None:
        self._weights = [weight.requires_grad_() for weight in weights]
        self._optimizer = torch.optim.AdamW(
            self._weights, lr=self._config.learning_rate, weight_decay=0
        )

    def save(self, file: Path) -> None:
        state: dict[str, Tensor] = {}
        for k, weight in enumerate(self._weights):
            state[f"weight.{k}"] = weight.detach().clone()
            assert self._optimizer is not None
            for name, value in self._optimizer.state.get(weight, {}).items():
                state[f"optimizer.{name}.{k}"] = torch.as_tensor(value).clone()
        save_file(state, file)

    def restore(self, file: Path) -> None:
        state = load_file(file)
        if "weight.0" not in state:
            return
        self._take(state["weight.0"], state["weight.1"])
        assert self._optimizer is not None
        for k, weight in enumerate(self._weights):
            names = ("step", "exp_avg", "exp_avg_sq")
            kept = {name: state[key] for name in names if (key := f"optimizer.{name}.{k}") in state}
            if kept:
                self._optimizer.state[weight] = kept
