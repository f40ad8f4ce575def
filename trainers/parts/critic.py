"""A bounded function of state and action that seeks where the policy differs from its teacher."""

# torch is partly untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from ...core.config import Config
from ...core.errors import ModelError
from ...core.models import optimizer
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
            self._resume(optimizer.state_of(self._named, self._optimizer), device)
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

    def _take(self, *weights: Tensor) -> None:
        """These weights from now on, and an optimiser that has seen nothing."""
        self._weights = [weight.requires_grad_() for weight in weights]
        rate = self._config.learning_rate
        self._optimizer = torch.optim.AdamW(self._weights, lr=rate, weight_decay=0)

    @property
    def _named(self) -> dict[str, Tensor]:
        return {str(k): weight for k, weight in enumerate(self._weights)}

    def save(self, file: Path) -> None:
        optimizer.write(file, optimizer.state_of(self._named, self._optimizer))

    def restore(self, file: Path) -> None:
        """Raises: ModelError: the file is missing, damaged or of no critic."""
        state = optimizer.read(file)
        if not state:
            return  # It had met nothing yet.
        if not {"weight.0", "weight.1"} <= state.keys():
            raise ModelError(f"{file} holds {', '.join(sorted(state))}: it is of no critic")
        self._resume(state, "cpu")

    def _resume(self, state: Mapping[str, Tensor], device: torch.device | str) -> None:
        self._take(*(state[f"weight.{k}"].detach().to(device) for k in range(2)))
        optimizer.take(state, self._named, self._optimizer)
