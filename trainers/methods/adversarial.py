"""Adversarial imitation: become hard to tell from one's teachers, and right as well."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from ...core.models.scalar import DISCRIMINATOR
from ...core.protocols import Context
from ...core.types import Aggregation, Batch, Judged, Metrics
from ..parts.advantage import Baseline
from ..parts.credit import by_task
from ..parts.discriminator import Discriminator, DiscriminatorConfig, paired, whole_text
from ..parts.group_relative import LENGTH, GroupConfig, GroupRelative
from ..parts.teachers import TeacherNames, Teachers


class AdversarialConfig(GroupConfig):
    baseline: Baseline = "dr_grpo"
    aggregation: Aggregation = "seq-mean-token-sum-norm"
    length: int = LENGTH
    kl: float = Field(default=0.01, ge=0)
    teachers: TeacherNames = Field(default=["expert"])
    teacher_attempts: int | None = Field(default=None, ge=0)
    """Teachers' responses per task, together; None: as many as the policy's."""
    similarity: float = Field(default=1.0, ge=0)
    """What it is worth to be taken for a teacher."""
    answer: float = Field(default=1.0, ge=0)
    """What the judge's score is worth."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig()


class Adversarial(GroupRelative):
    """RIL: unified reinforcement and imitation learning (Lee et al. 2025, arXiv:2510.19307).

    Every group holds the policy's responses and as many of its teachers'. A discriminator D,
    pre-trained on the first of them, learns them first (1: the policy's, 0: a teacher's). Each
    response then earns 1 if D < 1/2 and the judge's score beside it; advantages are over all of
    the group, without division by the deviation, and teachers' responses are learned with theirs,
    their ratio being to the policy's own probability of them. The KL is to the model that the run
    began with, the paper's fine-tuned student.

    Departures: responses of teachers are made for each iteration's tasks, or read from files, not
    cached over epochs. D is pre-trained on the first iteration's pairs, in 4 passes, and not on
    40,000 prompts of its own; of an episode it reads the last prompt and the last answer, which is
    all of it unless the agent shows a window. The judge's score may be graded, where the paper's
    is 0 or 1 (``cut: 0.5`` of the judge makes it so). There are 8 responses a task by default, not
    16, and a sequence is one turn. The paper's fine-tuning before it is a warm start, or a phase of
    ``imitation``.
    """

    Config = AdversarialConfig

    def __init__(self, config: AdversarialConfig, context: Context) -> None:
        super().__init__(config, context)
        self._own = config
        settings = config.discriminator
        self._discriminator = Discriminator(settings, context.base, "binary", context.seed)
        self._teachers = Teachers(config.teachers, context)
        self._fresh = True
        self._found: Metrics = {}

    async def batches(self, judged: Sequence[Judged]) -> list[Batch]:
        groups = by_task(judged)
        taught = await self._teachers.respond(groups, self._own.teacher_attempts)
        pairs = [
            (whole_text(one), whole_text(other))
            for group, theirs in zip(groups, taught, strict=True)
            for one, other in paired(group, theirs)
        ]
        settings = self._own.discriminator
        epochs = settings.epochs + (settings.pretrain if self._fresh else 0)
        loop = asyncio.get_running_loop()
        learn = self._discriminator.learn
        self._found = await loop.run_in_executor(None, learn, pairs, epochs) if pairs else {}
        self._fresh = self._fresh and not pairs
        whole = [[*group, *theirs] for group, theirs in zip(groups, taught, strict=True)]
        return self.learned(whole, await self.rewards(whole))

    async def rewards(self, groups: Sequence[Sequence[Judged]]) -> list[list[float]]:
        texts = [whole_text(one) for group in groups for one in group]
        loop = asyncio.get_running_loop()
        likeness = await loop.run_in_executor(None, self._discriminator.scores, texts)
        like = iter(likeness)
        passed = [[float(next(like) < 0.5) for _ in group] for group in groups]
        if likeness:
            self._found["discriminator/mean"] = sum(likeness) / len(likeness)
        return [
            [self._own.similarity * a + self._own.answer * b for a, b in zip(x, y, strict=True)]
            for x, y in zip(passed, await super().rewards(groups), strict=True)
        ]

    @property
    def findings(self) -> Metrics:
        return self._found

    def save(self, folder: Path, images: Path) -> None:
        if not self._fresh:
            self._discriminator.save(folder)

    def restore(self, folder: Path) -> None:
        self._fresh = not (folder / DISCRIMINATOR).is_file()
        if not self._fresh:
            self._discriminator.restore(folder)
