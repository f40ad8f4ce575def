"""Generative adversarial imitation: be taken for who wrote the demonstrations."""

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from ...core.files import read_json, write_json
from ...core.protocols import Context, Plan
from ...core.types import Aggregation, Batch, Example, Judged, Metrics
from ..learning.examples import reinforce
from ..learning.loss import SequenceClip
from ..parts.advantage import own_turns
from ..parts.credit import TrainerConfig, by_task
from ..parts.discriminator import Discriminator, DiscriminatorConfig, paired, whole_text
from ..parts.teachers import TeacherNames, Teachers


class TextGAILConfig(TrainerConfig):
    aggregation: Aggregation = "seq-mean-token-sum"
    teachers: TeacherNames = Field(default=["expert"])
    clip: float = Field(default=0.2, ge=0, lt=1)
    """A response's ratio to the policy that sampled it is cut at 1 - clip and 1 + clip."""
    demonstrations: float = Field(default=0.3, ge=0, le=1)
    """The share of an iteration's examples that are demonstrations, at first."""
    decay: int = Field(default=100, ge=0)
    """Iterations over which that share falls to 0, linearly; 0: it stays."""
    demonstration_reward: float = 2.0
    """Of every demonstration, beside rewards of mean 0 and variance 1."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig()


class TextGAIL:
    """TextGAIL (Wu, Li, Yu 2021, arXiv:2004.13796).

    A response is paid its softmax share against a demonstration for the same prompt, by a
    contrastive discriminator that was pre-trained and learns after the policy's rewards are made.
    Rewards are normalised by their running mean and deviation and learned by PPO with one ratio a
    response; some demonstrations are learned beside them at a constant reward. The judge's score is
    not looked at.

    Departures: a sequence is one turn, whose reward is its episode's; its ratio weighs at most 10
    (``SequenceClip.most``) and is to the log-probabilities it was sampled with, which are not
    computed again. The discriminator is the language model with a LoRA, not a RoBERTa, reads an
    episode's last prompt and answer, and is pre-trained in 4 passes over the first iteration's
    pairs, not for 200 steps. ``decay`` is counted in iterations.
    """

    Config = TextGAILConfig

    def __init__(self, config: TextGAILConfig, context: Context) -> None:
        self._config = config
        self._context = context
        settings = config.discriminator
        self._discriminator = Discriminator(settings, context.base, "contrastive", context.seed)
        self._teachers = Teachers(config.teachers, context)
        self._moments = Moments()
        self._step = 0
        self._found: Metrics = {}

    @property
    def plan(self) -> Plan:
        return Plan(self._config.tasks_per_iteration, self._config.attempts_per_task)

    async def batches(self, judged: Sequence[Judged]) -> list[Batch]:
        config, settings = self._config, self._config.discriminator
        groups = by_task(judged)
        self._found = {}
        taught = await self._teachers.respond(groups, None)
        pairs = [
            pair
            for group, theirs in zip(groups, taught, strict=True)
            for pair in paired(group, theirs)
        ]
        if not pairs:
            return []
        first = not self._discriminator.net.updates
        loop = asyncio.get_running_loop()
        texts = [(whole_text(mine), whole_text(other)) for mine, other in pairs]
        learn = self._discriminator.learn
        if first:
            await loop.run_in_executor(None, learn, texts, settings.pretrain)
        shares = await loop.run_in_executor(None, self._discriminator.shares, texts)
        self._found = await loop.run_in_executor(None, learn, texts, settings.epochs)
        self._found["discriminator/share"] = math.fsum(shares) / len(shares)
        rewards = self._moments.normalised(shares)
        share = mixed(self._step, config.demonstrations, config.decay)
        mine = [
            example
            for (one, _), reward in zip(pairs, rewards, strict=True)
            for example in self._examples(one, reward)
        ]
        shown = [
            example
            for _, one in pairs
            for example in self._examples(one, config.demonstration_reward)
        ]
        count = round(len(mine) * share / (1 - share)) if share < 1 else len(shown)
        examples = mine if share < 1 else []
        examples += [shown[k % len(shown)] for k in range(count)]
        self._step += 1
        loss = SequenceClip(
            config.clip, config.clip, aggregation=config.aggregation, length=config.length
        )
        return [Batch(loss, tuple(examples), config.epochs)]

    def _examples(self, one: Judged, reward: float) -> list[Example]:
        return reinforce(one.trajectory, [reward] * len(own_turns(one)))

    @property
    def findings(self) -> Metrics:
        return self._found

    def save(self, folder: Path, images: Path) -> None:
        write_json(folder / "text_gail.json", {"step": self._step, **vars(self._moments)})
        self._discriminator.save(folder)

    def restore(self, folder: Path) -> None:
        state = read_json(folder / "text_gail.json")
        self._step = state.pop("step")
        self._moments = Moments(**state)
        self._discriminator.restore(folder)


class Moments:
    """Running mean and deviation of everything that was seen."""

    def __init__(self, count: int = 0, total: float = 0.0, squares: float = 0.0) -> None:
        self.count, self.total, self.squares = count, total, squares

    def normalised(self, values: Sequence[float]) -> list[float]:
        """Less the mean, over the deviation, of all so far and these; 0 if all were the same."""
        self.count += len(values)
        self.total += math.fsum(values)
        self.squares += math.fsum(value * value for value in values)
        mean = self.total / self.count
        deviation = math.sqrt(max(0.0, self.squares / self.count - mean * mean))
        return [(value - mean) / (deviation + 1e-6) for value in values]


def mixed(step: int, share: float, decay: int) -> float:
    """The share of demonstrations at an iteration: from ``share`` to 0, linearly."""
    return share * max(0.0, 1 - step / decay) if decay else share
