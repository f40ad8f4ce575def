"""Asking a policy something outside a world: under a deadline, many at once, failures counted."""

import asyncio
import math
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ..checked import checked_completion
from ..errors import PolicyError
from ..protocols import HasEmbeddings, Policy
from ..seeds import derive
from ..types import Completion, Prompt, Sampling
from .waiting import Failures, deadline


@dataclass(frozen=True)
class WithDeadline:
    """A policy whose every answer has a deadline."""

    policy: Policy
    timeout_s: float
    heard: Callable[[Completion], None] | None = None
    """Hears of every completion."""

    @property
    def checkpoint(self) -> str:
        return self.policy.checkpoint

    def batch_slot(self) -> AbstractContextManager[None]:
        return self.policy.batch_slot()

    async def complete(self, prompt: Prompt, sampling: Sampling, seed: int) -> Completion:
        async with deadline(self.timeout_s, "the policy's completion"):
            completion = await self.policy.complete(prompt, sampling, seed)
        checked_completion(completion, self.checkpoint)
        if self.heard:
            self.heard(completion)
        return completion

    async def score(self, prompt: Prompt, completion: Completion) -> Completion:
        async with deadline(self.timeout_s, "the policy's log-probabilities"):
            scored = await self.policy.score(prompt, completion)
        return checked_completion(scored, self.checkpoint)

    async def load(self, checkpoint: Path | None) -> None:
        await self.policy.load(checkpoint)

    async def close(self) -> None:
        await self.policy.close()


@dataclass(frozen=True)
class EmbedderWithDeadline(WithDeadline):
    """The same of one that makes embeddings."""

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        assert isinstance(self.policy, HasEmbeddings)
        async with deadline(self.timeout_s, "the policy's embeddings"):
            return await self.policy.embed(texts)


def with_deadline(
    policy: Policy, timeout_s: float, heard: Callable[[Completion], None] | None = None
) -> WithDeadline:
    """``policy``, whose answers have that deadline; it can do what it could."""
    kind = EmbedderWithDeadline if isinstance(policy, HasEmbeddings) else WithDeadline
    return kind(policy, timeout_s, heard)


async def yes_share(policy: Policy, prompt: Prompt, yes: str = "yes", no: str = "no") -> float:
    """p(yes) / (p(yes) + p(no)), of the two answers as a whole; in [0, 1]."""
    gap = 0.0
    for text, sign in ((no, 1.0), (yes, -1.0)):
        scored = await policy.score(prompt, Completion(text))
        gap += sign * sum(scored.logprobs)
    return 1 / (1 + math.exp(min(gap, 700.0)))


Question: TypeAlias = tuple[Prompt, Completion]
"""A prompt, and what was said to it."""


async def score_all(
    policy: Policy, questions: Sequence[Question], max_failures: float = 0.5
) -> list[Completion | None]:
    """``policy.score`` of each, in order; None where it failed.

    Raises:
        PolicyError: more than the share ``max_failures`` failed; holds the first traceback.
    """
    failures = Failures(
        len(questions), max_failures, PolicyError, "texts could not be scored", "max_failures"
    )

    async def one(prompt: Prompt, completion: Completion) -> Completion | None:
        try:
            return await policy.score(prompt, completion)
        except Exception as cause:
            failures.add(cause)
            return None

    return await _together([one(*question) for question in questions])


async def ask(
    policy: Policy,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seed: int,
    max_failures: float = 0.5,
) -> list[Completion | None]:
    """One completion each, in order; None where there is none. Prompt k has a seed of its own.

    Raises:
        PolicyError: more than the share ``max_failures`` failed; holds the first traceback.
    """
    failures = Failures(len(prompts), max_failures, PolicyError, "questions failed", "max_failures")

    async def one(index: int) -> Completion | None:
        with slots[index]:
            try:
                return await policy.complete(prompts[index], sampling, derive(seed, index))
            except Exception as cause:
                failures.add(cause)
                return None

    # A slot for all before anybody asks, so that the batches are the same every time.
    slots = [ExitStack() for _ in prompts]
    for slot in slots:
        slot.enter_context(policy.batch_slot())
    try:
        return await _together([one(index) for index in range(len(prompts))])
    finally:
        for slot in slots:
            slot.close()


async def _together(
    answers: Sequence[Coroutine[Any, Any, Completion | None]],
) -> list[Completion | None]:
    """All at once, in order; the first PolicyError ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(answer) for answer in answers]
    except* PolicyError as several:
        raise several.exceptions[0] from None
    return [task.result() for task in tasks]
