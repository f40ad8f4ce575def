"""A network that tells the policy's text from its teachers': the backbone, a LoRA, one number."""

# torch is partly untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import random
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from ...core.models.scalar import DISCRIMINATOR, Row, ScalarConfig, ScalarModel, Text
from ...core.seeds import derive
from ...core.types import Judged, Metrics
from ..learning.examples import asked

Objective: TypeAlias = Literal["binary", "contrastive"]


class DiscriminatorConfig(ScalarConfig):
    epochs: int = Field(default=1, ge=0)
    """Passes over each iteration's pairs; 0: it stays as it was pre-trained."""
    pretrain: int = Field(default=4, ge=0)
    """Passes over the first iteration's pairs, before it pays any reward."""


class Discriminator:
    """z(text), of which sigmoid(z) is D: near 1 for the student's text, near 0 for a teacher's.

    ``binary`` maximises mean[log D(student) + log(1 - D(teacher))] (RIL, arXiv:2510.19307);
    ``contrastive`` the mean of log sigmoid(z_student - z_teacher) over pairs with one prompt, where
    -z is TextGAIL's score of being human (arXiv:2004.13796). At first D is 1/2 everywhere.
    """

    def __init__(
        self, config: DiscriminatorConfig, model: str, objective: Objective, seed: int
    ) -> None:
        """Raises: ModelError, PolicyError: the model cannot be opened."""
        self._config = config
        self._objective: Objective = objective
        self._seed = seed
        self.net = ScalarModel(config, model, seed)

    def scores(self, texts: Sequence[Text]) -> list[float]:
        """D of each text, in [0, 1]."""
        return torch.tensor(self.net.values(texts), dtype=torch.float64).sigmoid().tolist()

    def shares(self, pairs: Sequence[tuple[Text, Text]]) -> list[float]:
        """How far each first text is taken for a teacher's beside the second: in [0, 1]."""
        mine, theirs = (self.net.values([pair[side] for pair in pairs]) for side in (0, 1))
        gap = torch.tensor(theirs, dtype=torch.float64) - torch.tensor(mine, dtype=torch.float64)
        return gap.sigmoid().tolist()

    def learn(self, pairs: Sequence[tuple[Text, Text]], epochs: int) -> Metrics:
        """``pairs`` of a student's and a teacher's text; the last pass's mean loss and accuracy."""
        rows = [(self.net.ids(student), self.net.ids(teacher)) for student, teacher in pairs]
        losses: list[float] = []
        right: list[float] = []
        for _ in range(epochs):
            losses, right = [], []
            order = list(range(len(rows)))
            random.Random(derive(self._seed, "pairs", self.net.updates)).shuffle(order)
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

    def _step(self, pairs: Sequence[tuple[Row, Row]]) -> tuple[float, float]:
        self.net.clear()
        total, right = 0.0, 0
        order = sorted(range(len(pairs)), key=lambda k: max(map(len, pairs[k])))
        for part in self.net.parts(order, [max(pair, key=len) for pair in pairs], 2):
            rows = [pairs[k][side] for side in (0, 1) for k in part]
            student, teacher = self.net.forward(rows).chunk(2)
            loss = objective(student, teacher, self._objective).sum() / len(pairs)
            loss.backward()
            total += float(loss.detach())
            right += int(((student > 0).sum() + (teacher < 0).sum()).item())
        self.net.step()
        return total, right / (2 * len(pairs))

    def save(self, folder: Path) -> None:
        self.net.save(folder / DISCRIMINATOR)

    def restore(self, folder: Path) -> None:
        """Raises: ModelError: the folder's file is damaged or of another model."""
        self.net.restore(folder / DISCRIMINATOR)


def objective(student: Tensor, teacher: Tensor, kind: Objective) -> Tensor:
    """(B,) losses of pairs, from z of the student's and z of the teacher's text."""
    if kind == "contrastive":
        return functional.softplus(teacher - student)
    return functional.softplus(-student) + functional.softplus(teacher)


def paired(students: Sequence[Judged], teachers: Sequence[Judged]) -> list[tuple[Judged, Judged]]:
    """Everybody at least once, if there is anybody on both sides."""
    if not (students and teachers):
        return []
    pairs = zip_longest(students, teachers)
    return [
        (s or students[k % len(students)], t or teachers[k % len(teachers)])
        for k, (s, t) in enumerate(pairs)
    ]


def whole_text(one: Judged) -> Text:
    """All of an episode: its last prompt and what was answered."""
    last = one.trajectory.answers[-1]
    return asked(one.trajectory, last), one.trajectory.steps[last].action.completion
