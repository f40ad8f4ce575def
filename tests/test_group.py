"""Group-relative advantages by hand, their invariances, and what reaches the learner."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from components import context_of, episode
from hypothesis import assume, given
from hypothesis import strategies as st

from selfwright.core.types import Batch, Completion, Judged, Prompt, Verdict
from selfwright.trainers.learning.loss import Clip
from selfwright.trainers.methods.group import GRPO, RLOO, DrGRPO
from selfwright.trainers.parts.advantage import advantages, estimated, step_advantages
from selfwright.trainers.parts.group_relative import GroupRelative

Rewards = st.lists(st.floats(-10, 10).map(lambda x: round(x, 3)), min_size=2, max_size=9)


def test_advantages_by_hand() -> None:
    rewards = [1.0, 0.0, 0.0, 1.0]
    # The mean is 1/2; squared deviations sum to 1, over G - 1 = 3.
    assert advantages(rewards, "grpo") == pytest.approx(
        [0.5 / (math.sqrt(1 / 3) + 1e-6) * sign for sign in (1, -1, -1, 1)]
    )
    assert advantages(rewards, "dr_grpo") == [0.5, -0.5, -0.5, 0.5]
    # Each against the mean of the other three: 1 - 1/3, 0 - 2/3.
    assert advantages(rewards, "rloo") == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])


@given(Rewards, st.floats(-50, 50), st.floats(0.5, 20))
def test_shifts_never_matter_and_scale_only_where_nothing_divides_by_it(
    rewards: list[float], shift: float, scale: float
) -> None:
    assume(max(rewards) - min(rewards) > 0.1)
    for how in ("grpo", "rloo", "dr_grpo"):
        plain = advantages(rewards, how)
        assert advantages([r + shift for r in rewards], how) == pytest.approx(plain, abs=1e-6)
        scaled = advantages([r * scale for r in rewards], how)
        factor = 1 if how == "grpo" else scale
        assert scaled == pytest.approx([factor * a for a in plain], rel=1e-3, abs=1e-6)


@given(Rewards)
def test_rloo_is_dr_grpo_times_g_over_g_less_one(rewards: list[float]) -> None:
    share = len(rewards) / (len(rewards) - 1)
    centred = advantages(rewards, "dr_grpo")
    assert advantages(rewards, "rloo") == pytest.approx([share * a for a in centred], abs=1e-9)
    assert sum(centred) == pytest.approx(0, abs=1e-9)


@given(st.floats(-10, 10), st.integers(1, 9))
def test_equal_rewards_and_groups_of_one_teach_nothing(reward: float, size: int) -> None:
    for how in ("grpo", "rloo", "dr_grpo"):
        assert advantages([reward] * size, how) == [0.0] * size


def test_the_divergence_of_a_token_is_the_losss() -> None:
    assert estimated(0.5, "k1") == -0.5
    assert estimated(0.5, "k2") == 0.125
    assert estimated(0.5, "k3") == pytest.approx(math.exp(0.5) - 0.5 - 1)
    assert estimated(0.0, "k3") == 0


def batches(trainer: type[GroupRelative], judged: Sequence[Judged], **keys: Any) -> list[Batch]:
    parts = {key: keys.pop(key) for key in ("open",) if key in keys}
    config = trainer.Config.model_validate(keys)
    return asyncio.run(trainer(config, context_of(**parts)).batches(judged))


def test_every_turn_of_an_attempt_has_its_advantage_and_its_old_logprobs() -> None:
    judged = [
        episode(1.0, ("o", "a"), ("p", "b")),
        episode(0.0, ("o", "c"), attempt=1),
        episode(0.0, ("o", "d"), task="u"),
        episode(0.0, ("o", "e"), task="u", attempt=1),
    ]
    (batch,) = batches(DrGRPO, judged, length=16)
    assert [(e.completion.text, e.advantage) for e in batch.examples] == [
        ("a", 0.5),
        ("b", 0.5),
        ("c", -0.5),
        ("d", 0.0),
        ("e", 0.0),
    ]
    assert all(e.completion.logprobs == (-1.0,) for e in batch.examples)
    assert batch.loss == Clip(aggregation="seq-mean-token-sum-norm", length=16)
    prompt = batch.examples[1].prompt
    assert [message.role for message in prompt.messages][-3:] == ["user", "assistant", "user"]
    assert "p" in prompt.messages[-1].text


def test_defaults_are_the_papers() -> None:
    judged = [episode(1.0, ("o", "a")), episode(0.0, ("o", "b"), attempt=1)]
    (batch,) = batches(GRPO, judged, kl=0.04)
    assert batch.loss == Clip(0.2, 0.2, None, 0.04, "k3", "seq-mean-token-mean")
    (batch,) = batches(RLOO, judged)
    assert isinstance(batch.loss, Clip) and batch.loss.aggregation == "seq-mean-token-sum"
    assert [e.advantage for e in batch.examples] == [1.0, -1.0]


def test_nothing_is_learned_from_groups_without_differences() -> None:
    judged = [episode(0.0, ("o", "a")), episode(0.0, ("o", "b"), attempt=1)]
    alone = [episode(1.0, ("o", "a"))]
    undecided = [
        episode(None, ("o", "a")),
        episode(1.0, ("o", "b"), attempt=1),
    ]
    for trainer in (GRPO, RLOO, DrGRPO):
        assert batches(trainer, judged) == batches(trainer, alone) == []
        assert batches(trainer, undecided) == batches(trainer, []) == []
    # The pull towards the base is there all the same.
    assert len(batches(GRPO, judged, kl=0.1)[0].examples) == 2


def test_a_group_of_one_is_refused_beforehand() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        GRPO.Config.model_validate({"attempts_per_task": 1})


def test_replayed_turns_are_not_learned() -> None:
    judged = [
        episode(1.0, ("o", "a"), ("p", "b"), replayed=1),
        episode(0.0, ("o", "a"), ("p", "c"), replayed=1, attempt=1),
    ]
    (batch,) = batches(DrGRPO, judged, step_weight=1.0)
    assert [e.completion.text for e in batch.examples] == ["b", "c"]


STEPS = [
    episode(1.0, ("o", "a"), ("p", "b"), ("p", "c")),
    episode(0.0, ("o", "d"), ("q", "e"), attempt=1),
]


def test_step_groups_by_hand() -> None:
    # From o: returns 0.25 and 0. From p, twice in one attempt: 0.5 and 1. From q: nobody else.
    made = step_advantages(STEPS, [1.0, 0.0], 0.5, "dr_grpo")
    assert made == [[0.125, -0.25, 0.25], [-0.125, 0.0]]


def test_without_step_weight_gigpo_is_grpo() -> None:
    (plain,) = batches(GRPO, STEPS)
    (none,) = batches(GRPO, STEPS, step_weight=0.0, gamma=0.3)
    assert plain == none
    apart = [
        episode(1.0, ("o", "a"), ("p", "b")),
        episode(0.0, ("q", "c"), ("r", "d"), attempt=1),
    ]
    # All observations differ: no step has anything to compare with.
    assert batches(GRPO, apart, step_weight=2.0) == batches(GRPO, apart)
    (both,) = batches(DrGRPO, STEPS, step_weight=2.0, gamma=0.5)
    assert [e.advantage for e in both.examples] == [0.75, 0.0, 1.0, -0.75, -0.5]


class Reference:
    """A base that finds what "a" says as likely as it was, all else less so by 2 nats."""

    async def score(self, prompt: Prompt, completion: Completion) -> Completion:
        return replace(completion, logprobs=(-1.0 if completion.text == "a" else -3.0,))


def test_a_divergence_in_the_reward_is_paid_before_advantages_are_made() -> None:
    async def opened(name: str) -> Reference:
        assert name == "base"
        return Reference()

    judged = [
        episode(1.0, ("o", "a"), ("p", "b")),
        episode(1.0, ("o", "a"), attempt=1),
    ]
    (batch,) = batches(DrGRPO, judged, kl=0.1, kl_in="reward", estimator="k1", open=opened)
    # b drifted by 2 nats: rewards 0.8 and 1.
    assert [e.advantage for e in batch.examples] == pytest.approx([-0.1, -0.1, 0.1])
    assert not batch.loss.needs


def test_the_judges_score_counts_not_the_worlds_reward() -> None:
    one = episode(0.25, ("o", "a"))
    other = replace(episode(1.0, ("o", "b"), attempt=1), verdict=Verdict(0.75, "", "other"))
    (batch,) = batches(DrGRPO, [one, other])
    assert [e.advantage for e in batch.examples] == [-0.25, 0.25]
