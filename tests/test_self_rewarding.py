"""Pairs of one's own attempts: the best against the worst, or none."""

import asyncio

from components import context_of, episode

from selfwright.core.types import Judged
from selfwright.trainers.learning.loss import DPO
from selfwright.trainers.methods.self_rewarding import SelfRewarding, SelfRewardingConfig


def group(task: str, *scores: float | None) -> list[Judged]:
    return [
        episode(score, ("o", f"{task}{k}"), ("p", f"{task}{k}!"), task=task, attempt=k)
        for k, score in enumerate(scores)
    ]


def test_the_best_is_preferred_to_the_worst_where_they_differ() -> None:
    trainer = SelfRewarding(SelfRewardingConfig(beta=0.2), context_of())
    judged = [
        *group("a", 0.4, 0.8, 0.2, 0.6),
        *group("b", 0.6, 0.6, 0.6),  # nothing to prefer,
        *group("c", None, 0.4),  # nothing to compare with: what cannot be read is dropped,
        *group("d", None, 1.0, 0.0),
    ]
    (batch,) = asyncio.run(trainer.batches(judged))
    assert batch.loss == DPO(0.2)
    told = [(e.completion.text, e.advantage, e.group) for e in batch.examples]
    assert told == [
        ("a1", 1.0, 0),
        ("a1!", 1.0, 0),
        ("a2", -1.0, 0),
        ("a2!", -1.0, 0),
        ("d1", 1.0, 3),
        ("d1!", 1.0, 3),
        ("d2", -1.0, 3),
        ("d2!", -1.0, 3),
    ]
    # The reference is the policy that sampled them.
    assert all(e.completion.logprobs == (-1.0,) for e in batch.examples)
    assert asyncio.run(trainer.batches(group("b", 0.6, 0.6))) == []
