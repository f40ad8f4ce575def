"""Which of several refinements is learned."""

import math
import random
from collections.abc import Sequence
from typing import Literal, TypeAlias

from ...core.errors import PolicyError
from ...core.play.asking import yes_share
from ...core.protocols import Context, HasEmbeddings
from ...core.types import Completion
from ..learning.examples import asked
from .feedback import Item, asking_more

QUESTIONS = (
    "Does the new answer do what the feedback asks for?",
    "Has the feedback been taken into account in the new answer?",
    "Is everything the feedback complains about mended in the new answer?",
    "Would whoever gave the feedback be content with the new answer?",
    "Compared with the old answer, is the new one improved in the way the feedback says?",
)
"""Asked together, for a single wording sways the answer (Scheurer et al. 2023)."""


Select: TypeAlias = Literal["reward", "instruct", "embedding", "random"]
"""Who picks: the world, the policy by ``instruct``, ``similarity`` to the feedback, chance."""


async def candidates(
    context: Context, item: Item, refinements: Sequence[Completion], select: Select, seed: int
) -> Sequence[Completion]:
    """Refinements to be tried in the world: all, where its word decides, else the picked one."""
    if not refinements:
        return refinements
    match select:
        case "reward":
            return refinements
        case "instruct":
            scores = await instruct(context, item, refinements)
        case "embedding":
            scores = await similarity(context, item, refinements)
        case "random":
            scores = [0.0] * len(refinements)
    return [refinements[pick(scores, seed)]]


async def instruct(context: Context, item: Item, refinements: Sequence[Completion]) -> list[float]:
    """InstructRM: mean over ``QUESTIONS`` of the policy's p(yes) / (p(yes) + p(no))."""
    before = asked(item.trajectory, item.step)
    scores: list[float] = []
    for refinement in refinements:
        shares = [
            await yes_share(context.policy, asking_more(before, _question(item, refinement, q)))
            for q in QUESTIONS
        ]
        scores.append(sum(shares) / len(shares))
    return scores


def _question(item: Item, refinement: Completion, question: str) -> str:
    return (
        f"OLD ANSWER:\n{item.old_text}\n\nFEEDBACK:\n{item.feedback}\n\n"
        f"NEW ANSWER:\n{refinement.text}\n\n{question} Answer yes or no."
    )


async def similarity(
    context: Context, item: Item, refinements: Sequence[Completion]
) -> list[float]:
    """Cosines of the feedback's embedding and each refinement's.

    Raises:
        PolicyError: the policy makes no embeddings.
    """
    policy = context.policy
    if not isinstance(policy, HasEmbeddings):
        raise PolicyError("select: embedding needs a policy that embeds texts; use another select")
    about, *vectors = await policy.embed([item.feedback, *(r.text for r in refinements)])
    return [cosine(about, one) for one in vectors]


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """0 if either is all zeros."""
    norm = math.hypot(*a) * math.hypot(*b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / norm if norm else 0.0


def pick(scores: Sequence[float], seed: int) -> int:
    """The place of the highest score, a random one of those that share it."""
    best = max(scores)
    return random.Random(seed).choice([k for k, score in enumerate(scores) if score == best])


def shares(rewards: Sequence[float], beta: float) -> list[float]:
    """(N,) weights proportional to exp(beta * reward), 1 in all.

    Those of the target distribution, before the correction for how refinements were come by.
    """
    top = max(rewards)
    weights = [math.exp(beta * (reward - top)) for reward in rewards]
    return [weight / sum(weights) for weight in weights]
