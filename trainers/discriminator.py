"""A network that tells the policy's text from its teachers': a copy of the backbone, one number."""

# torch is partly untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from pydantic import Field
from safetensors.torch import (
    load_file,  # pyright: ignore[reportUnknownVariableType]
    save_file,  # pyright: ignore[reportUnknownVariableType]
)
from torch import Tensor
from torch.nn import functional

from ..core.config import Config
from ..core.models import open_model
from ..core.seeds import derive
from ..core.types import Completion, Message, Metrics

Objective: TypeAlias = Literal["binary", "contrastive"]
Text: TypeAlias = tuple[Sequence[Message], Completion]
"""A prompt and what was answered."""


class DiscriminatorConfig(Config):
    learning_rate: float = Field(default=1e-4, gt=0)
    batch_size: int = Field(default=32, ge=1)
    """Pairs per optimiser step."""
    epochs: int = Field(default=1, ge=0)
    """Passes over each iteration's pairs; 0: it stays as it was pre-trained."""
    pretrain: int = Field(default=4, ge=0)
    """Passes over the first iteration's pairs, before it pays any reward."""
    token_budget: int = Field(default=4096, ge=1)
    """Padded tokens computed at once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


class Discriminator:
    """z(text), of which sigmoid(z) is D: near 1 for the student's text, near 0 for a teacher's.

    ``binary`` maximises mean[log D(student) + log(1 - D(teacher))] (RIL, arXiv:2510.19307);
    ``contrastive`` the mean of log sigmoid(z_student - z_teacher) over pairs with one prompt, where
    -z is TextGAIL's score of being human (arXiv:2004.13796).
    """

    def __init__(
        self,
        config: DiscriminatorConfig,
        model: str,
        objective: Objective,
        seed: int,
    ) -> None:
        """Raises: PolicyError: the model cannot be opened."""
        self._config = config
        self._objective: Objective = objective
        self._seed = seed
        device = config.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        whole, self._tokens = open_model(model, device, "float32", False)
        self.body: Any = whole.get_decoder()
        self.head = torch.nn.Linear(whole.config.get_text_config().hidden_size, 1).to(device)
        # Nothing told apart at first: D is 1/2 everywhere.
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        self._trained = [*self.body.parameters(), *self.head.parameters()]
        self._optimizer = torch.optim.AdamW(self._trained, lr=config.learning_rate, weight_decay=0)
        self._updates = 0

    def scores(self, texts: Sequence[Text]) -> list[float]:
        """D of each text, in [0, 1]."""
        rows = [self._ids(text) for text in texts]
        found = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda k: len(rows[k]))
        with torch.no_grad():
            for part in self._parts(order, rows):
                made: list[float] = torch.sigmoid(self._logits([rows[k] for k in part])).tolist()
                for k, score in zip(part, made, strict=True):
                    found[k] = score
        return found

    def learn(self, pairs: Sequence[tuple[Text, Text]], epochs: int) -> Metrics:
        """``pairs`` of a student's and a teacher's text; the last pass's mean loss and accuracy."""
        rows = [(self._ids(student), self._ids(teacher)) for student, teacher in pairs]
        losses: list[float] = []
        right: list[float] = []
        for _ in range(epochs):
            losses, right = [], []
            order = list(range(len(rows)))
            random.Random(derive(self._seed, "pairs", self._updates)).shuffle(order)
            for begin in range(0, len(order), self._config.batch_size):
                loss, accuracy = self._step(
                    [rows[k] for k in order[begin:][: self._config.batch_size]]
                )
                losses.append(loss)
                right.append(accuracy)
        if not losses:
            return {}
        return {
            "discriminator/loss": sum(losses) / len(losses),
            "discriminator/accuracy": sum(right) / len(right),
        }

    def _step(self, pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[float, float]:
        self._optimizer.zero_grad(set_to_none=True)
        total, right = 0.0, 0
        flat = [ids for pair in pairs for ids in pair]
        order = sorted(range(len(pairs)), key=lambda k: max(map(len, pairs[k])))
        for part in self._parts(order, [max(pair, key=len) for pair in pairs], 2):
            rows = [flat[2 * k + side] for side in (0, 1) for k in part]
            student, teacher = self._logits(rows).chunk(2)
            loss = objective(student, teacher, self._objective).sum() / len(pairs)
            loss.backward()
            total += float(loss.detach())
            right += int(((student > 0).sum() + (teacher < 0).sum()).item())
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._updates += 1
        return total, right / (2 * len(pairs))

    def _parts(
        self, order: Sequence[int], rows: Sequence[list[int]], each: int = 1
    ) -> list[list[int]]:
        """``order``, shortest rows first, in groups of at most ``token_budget`` padded tokens."""
        parts: list[list[int]] = []
        for k in order:
            size = each * (len(parts[-1]) + 1) * len(rows[k]) if parts else 0
            if parts and size <= self._config.token_budget:
                parts[-1].append(k)
            else:
                parts.append([k])
        return parts

    def _ids(self, text: Text) -> list[int]:
        prompt, said = text
        return [*self._tokens.prompt(prompt), *self._tokens.answer(said)]

    def _logits(self, rows: Sequence[list[int]]) -> Tensor:
        """(B,) z, read at each row's last token."""
        longest, device = max(map(len, rows)), self.head.weight.device
        pad = self._tokens.pad
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
        last = torch.tensor([len(row) - 1 for row in rows], device=device)
        hidden = self.body(input_ids=ids, use_cache=False).last_hidden_state
        return self.head(hidden[torch.arange(len(rows), device=device), last])[:, 0]

    def save(self, folder: Path) -> None:
        state: dict[str, Tensor] = {"updates": torch.tensor(self._updates)}
        for k, weight in enumerate(self._trained):
            state[f"weight.{k}"] = weight.detach().clone().contiguous()
            for name, value in self._optimizer.state.get(weight, {}).items():
                state[f"optimizer.{name}.{k}"] = torch.as_tensor(value).clone().contiguous()
        save_file(state, folder / "discriminator.safetensors")

    def restore(self, folder: Path) -> None:
        state = load_file(folder / "discriminator.safetensors")
        self._updates = int(state["updates"])
        with torch.no_grad():
            for k, weight in enumerate(self._trained):
                weight.copy_(state[f"weight.{k}"])
                kept = {
                    name: state[f"optimizer.{name}.{k}"].to(
                        weight.device if name != "step" else "cpu"
                    )
                    for name in ("step", "exp_avg", "exp_avg_sq")
                    if f"optimizer.{name}.{k}" in state
                }
                if kept:
                    self._optimizer.state[weight] = kept


def objective(student: Tensor, teacher: Tensor, kind: Objective) -> Tensor:
    """(B,) losses of pairs, from z of the student's and z of the teacher's text."""
    if kind == "contrastive":
        return functional.softplus(teacher - student)
    return functional.softplus(-student) + functional.softplus(teacher)
