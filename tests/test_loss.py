"""Losses worked by hand, and the identities that must hold for any numbers."""

# torch is partly untyped.
# pyright: reportUnknownMemberType=false

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from selfwright.core.types import Aggregation, Need, TokenArrays
from selfwright.trainers.learning.loss import (
    DPO,
    NLL,
    Clip,
    ContestedGap,
    CovarianceClip,
    MomentGap,
    SequenceClip,
    following,
    kl,
    sums,
)
from selfwright.trainers.learning.pack import Row, Span, token_weights

LOG = math.log


def arrays(
    new: Sequence[float],
    old: Sequence[float],
    advantages: Sequence[float],
    reference: Sequence[float] | None = None,
) -> TokenArrays:
    return TokenArrays(
        torch.tensor(new, requires_grad=True),
        torch.tensor(old),
        torch.tensor(advantages),
        None if reference is None else torch.tensor(reference),
    )


def gradient(loss: NLL | Clip, tokens: TokenArrays) -> list[float]:
    autograd: Any = torch.autograd
    (slopes,) = autograd.grad(loss(tokens).sum(), tokens.logprobs)
    return slopes.tolist()


def test_nll_is_the_weighted_negative_log_likelihood() -> None:
    made = arrays([-1.0, -2.0, -0.5], [0.0, 0.0, 0.0], [1.0, 3.0, -2.0])
    assert NLL()(made).tolist() == [1.0, 6.0, -1.0]
    assert gradient(NLL(), made) == [-1.0, -3.0, 2.0]


def test_a_loss_says_what_it_needs() -> None:
    step, distribution = {Need.WHOLE_STEP}, {Need.DISTRIBUTION}
    assert not NLL().needs and not Clip().needs
    assert CovarianceClip().needs == SequenceClip().needs == DPO().needs == step
    assert CovarianceClip(kl=0.1).needs == {Need.REFERENCE} | step
    assert MomentGap("t").needs == distribution
    assert MomentGap("t", critic=sums).needs == distribution | {Need.STATES}
    learning = distribution | {Need.STATES, Need.ADVERSARY}
    assert ContestedGap("t", critic=sums).needs == learning


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        # Inside the trust region: -rA, and its slope in log pi is the same.
        (1.1, 2.0, -2.2, -2.2),
        (0.9, -2.0, 1.8, 1.8),
        # Too likely already and still rewarded, too unlikely and still punished: cut, no slope.
        (1.5, 2.0, -2.6, 0.0),
        (0.5, -2.0, 1.4, 0.0),
        # The other two sides are never cut: a mistake can always be undone.
        (0.5, 2.0, -1.0, -1.0),
        (1.5, -2.0, 3.0, 3.0),
        (7.0, 0.0, 0.0, 0.0),
    ],
)
def test_clip_on_both_sides_and_for_both_signs(
    ratio: float, advantage: float, loss: float, slope: float
) -> None:
    made = arrays([-1.0 + LOG(ratio)], [-1.0], [advantage])
    clip = Clip(low=0.3, high=0.3)
    assert clip(made).item() == pytest.approx(loss, rel=1e-5)
    assert gradient(clip, made) == pytest.approx([slope], rel=1e-5)


def test_clip_may_be_uneven() -> None:
    made = arrays([LOG(1.25), LOG(0.75)], [0.0, 0.0], [1.0, -1.0])
    assert Clip(low=0.2, high=0.28)(made).tolist() == pytest.approx([-1.25, 0.8])
    assert Clip(low=0.3, high=0.2)(made).tolist() == pytest.approx([-1.2, 0.75])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (2.0, -1.0, 2.0, 2.0),
        (4.0, -1.0, 3.0, 0.0),
        (math.exp(100), -0.5, 1.5, 0.0),
        (0.1, -1.0, 0.8, 0.0),
        # Where the advantage is positive the second bound has no say.
        (4.0, 1.0, -1.2, 0.0),
        (0.1, 1.0, -0.1, -0.1),
    ],
)
def test_dual_clip_bounds_the_loss_of_what_is_punished(
    ratio: float, advantage: float, loss: float, slope: float
) -> None:
    made = arrays([LOG(ratio)], [0.0], [advantage])
    clip = Clip(dual=3.0)
    assert clip(made).item() == pytest.approx(loss, rel=1e-5)
    assert gradient(clip, made) == pytest.approx([slope], rel=1e-5)


def covariances(made: TokenArrays) -> list[float]:
    a, lp = made.advantages.tolist(), made.logprobs.tolist()
    mean_a, mean_lp = sum(a) / len(a), sum(lp) / len(lp)
    return [(x - mean_a) * (y - mean_lp) for x, y in zip(a, lp, strict=True)]


def test_covariance_clipping_by_hand() -> None:
    # Means: A 1, log pi -3; covariances: 3 * 2, 1 * 1, -1 * 1 and -3 * -4.
    made = arrays([-1.0, -2.0, -2.0, -7.0], [-1.0, -2.0, -2.0, -7.0], [4.0, 2.0, 0.0, -2.0])
    assert covariances(made) == [6.0, 1.0, -1.0, 12.0]
    # Half of four tokens may go, and two stand out.
    chosen = CovarianceClip(share=0.5, above=2.0, below=60.0).weigh(made, 0)
    assert chosen.tolist() == [0.0, 1.0, 1.0, 0.0]
    # Only one of them does below 10.
    chosen = CovarianceClip(share=0.5, above=2.0, below=10.0).weigh(made, 0)
    assert chosen.tolist() == [0.0, 1.0, 1.0, 1.0]
    # A share that comes to less than one token is one token, a random one of those two.
    few = {tuple(CovarianceClip(share=0.01).weigh(made, seed).tolist()) for seed in range(20)}
    assert few == {(0.0, 1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 0.0)}
    # The first one's ratio has been cut already.
    cut = arrays([-1.0, -2.0, -2.0, -7.0], [-2.0, -2.0, -2.0, -7.0], [4.0, 2.0, 0.0, -2.0])
    assert CovarianceClip(share=0.5).weigh(cut, 0).tolist() == [1.0, 1.0, 1.0, 0.0]


@given(
    st.lists(st.tuples(st.floats(-20, 0), st.floats(-5, 5)), min_size=1, max_size=40),
    st.floats(0.0, 0.5),
    st.integers(0, 5),
)
def test_covariance_clipping_leaves_out_few_and_only_what_stands_out(
    tokens: list[tuple[float, float]], share: float, seed: int
) -> None:
    logprobs, advantages = zip(*tokens, strict=True)
    made = arrays(logprobs, logprobs, advantages)
    left_out = CovarianceClip(share=share, above=0.5, below=9.0).weigh(made, seed) == 0
    assert int(left_out.sum()) <= max(1, int(share * len(tokens)))
    for value, out in zip(covariances(made), left_out.tolist(), strict=True):
        assert not out or 0.49 < value < 9.01
    constant = arrays(logprobs, logprobs, [2.0] * len(tokens))
    assert CovarianceClip(above=0.01).weigh(constant, seed).tolist() == [1.0] * len(tokens)


def test_the_weight_multiplies_loss_and_penalty() -> None:
    made = arrays([-1.0, -2.0], [-1.5, -1.0], [2.0, -1.0], [-2.0, -2.5])
    whole, half = Clip(kl=0.5)(made).tolist(), Clip(kl=0.5, weight=0.5)(made).tolist()
    assert half == pytest.approx([x / 2 for x in whole]) and any(whole)


def test_a_ratio_beyond_float32_spoils_nothing() -> None:
    made = arrays([0.0, 0.0], [-500.0, -500.0], [0.0, 1.0])
    assert Clip()(made).tolist() == pytest.approx([0.0, -1.2])
    assert gradient(Clip(), made) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [
        # d = log ref - log pi = log 2: k1 = -d, k2 = d^2 / 2, k3 = e^d - d - 1.
        ("k1", -LOG(2), 1.0),
        ("k2", LOG(2) ** 2 / 2, -LOG(2)),
        ("k3", 1 - LOG(2), -1.0),
    ],
)
def test_kl_estimators(estimator: Literal["k1", "k2", "k3"], value: float, slope: float) -> None:
    new, reference = torch.tensor([-2.0], requires_grad=True), torch.tensor([-2.0 + LOG(2)])
    estimate = kl(new, reference, estimator)
    assert estimate.item() == pytest.approx(value, rel=1e-5)
    estimate.sum().backward()
    assert new.grad is not None and new.grad.item() == pytest.approx(slope, rel=1e-5)
    clip = Clip(kl=0.1, estimator=estimator)
    assert clip.needs == {Need.REFERENCE}
    made = arrays([-2.0], [-2.0], [3.0], [-2.0 + LOG(2)])
    assert clip(made).item() == pytest.approx(-3.0 + 0.1 * value, rel=1e-5)


nats = st.floats(-20, 0, width=32)


@given(st.lists(st.tuples(nats, nats), min_size=1, max_size=20))
@example([(-1.186216316145794e-11, 0.0)])  # Where exp(d) - 1 - d is less than nothing.
def test_k3_is_never_negative_and_zero_only_for_equals(pairs: list[tuple[float, float]]) -> None:
    new, reference = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    k3 = kl(new, reference, "k3")
    assert (k3 >= 0).all()
    assert ((k3 == 0) <= ((new - reference).abs() < 1e-6)).all()
    assert kl(new, new, "k3").tolist() == [0.0] * len(pairs)


def test_estimates_average_to_the_divergence() -> None:
    pi = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    base = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    exact = float((pi * (pi / base).log()).sum())
    for estimator in ("k1", "k3"):
        assert float((pi * kl(pi.log(), base.log(), estimator)).sum()) == pytest.approx(exact)


@given(st.lists(st.tuples(nats, st.floats(-5, 5, width=32)), min_size=1, max_size=20))
def test_where_nothing_moved_ppo_is_reinforce(tokens: list[tuple[float, float]]) -> None:
    new, advantages = [t[0] for t in tokens], [t[1] for t in tokens]
    made = arrays(new, new, advantages)
    for clip in (Clip(), Clip(dual=3.0), Clip(low=0.1, high=0.3)):
        assert gradient(clip, made) == pytest.approx(gradient(NLL(), made), abs=1e-6)
        assert clip(made).tolist() == pytest.approx([-a for a in advantages], abs=1e-6)


def rows() -> list[Row]:
    """Three sequences of 1, 3 and 2 trained tokens, two of them in one row."""
    one, two, three = Span(1, 2, 1.0, (), 0), Span(4, 7, 1.0, (), 1), Span(2, 4, 1.0, (), 2)
    return [Row([9] * 7, spans=[one, two]), Row([9] * 4, spans=[three])]


@pytest.mark.parametrize(
    ("aggregation", "loss"),
    [
        # Token losses 6 | 1 2 3 | 10 20, by hand.
        ("token-mean", 42 / 6),
        ("seq-mean-token-mean", (6 / 1 + 6 / 3 + 30 / 2) / 3),
        ("seq-mean-token-sum", (6 + 6 + 30) / 3),
        ("seq-mean-token-sum-norm", (6 + 6 + 30) / 3 / 50),
    ],
)
def test_aggregation_by_hand(aggregation: Aggregation, loss: float) -> None:
    losses = [[[6.0], [1.0, 2.0, 3.0]], [[10.0, 20.0]]]
    weights = token_weights(rows(), aggregation, 50)
    total = sum(
        x * w
        for row, given in zip(losses, weights, strict=True)
        for span, scale in zip(row, given, strict=True)
        for x, w in zip(span, scale, strict=True)
    )
    assert total == pytest.approx(loss)


def grouped(
    new: Sequence[float],
    old: Sequence[float],
    advantages: Sequence[float],
    examples: Sequence[int],
    groups: Sequence[int] = (),
) -> TokenArrays:
    given = arrays(new, old, advantages)
    keys = torch.tensor(examples), torch.tensor(groups or examples)
    return replace(given, examples=keys[0], groups=keys[1])


def weighed(loss: SequenceClip | DPO, tokens: TokenArrays) -> list[float]:
    """The gradient that a learner takes: of the losses times what they were weighed by."""
    autograd: Any = torch.autograd
    still = replace(tokens, logprobs=tokens.logprobs.detach())
    total = (loss(tokens) * loss.weigh(still, 0)).sum()
    return autograd.grad(total, tokens.logprobs)[0].tolist()


def test_a_sequence_has_one_ratio() -> None:
    # Ratios: e^(0.05 + 0.05) = 1.105, inside; e^0.5, cut as it is rewarded; e^0.5, punished: not.
    new, old = [-1.0, -2.0, -1.0, -1.0], [-1.05, -2.05, -1.5, -1.5]
    made = grouped(new, old, [2.0, 2.0, 1.0, -1.0], [7, 7, 3, 4])
    slope = math.exp(0.1)
    expected = [-2 * slope, -2 * slope, 0.0, math.exp(0.5)]
    assert weighed(SequenceClip(), made) == pytest.approx(expected, rel=1e-5)
    # However unlike: 5 nats of two tokens weigh 10, not e^5.
    far = grouped([-1.0, -1.0], [-3.0, -4.0], [-1.0, -1.0], [0, 0])
    assert weighed(SequenceClip(), far) == pytest.approx([10.0, 10.0])


@given(st.lists(st.tuples(st.floats(-5, 0), st.floats(-5, 0)), min_size=2, max_size=12))
def test_dpo_has_the_gradient_of_dpo(pairs: list[tuple[float, float]]) -> None:
    autograd: Any = torch.autograd
    new, old = zip(*pairs, strict=True)
    count, beta = len(new), 0.3
    # Two pairs, told apart by parity; within each the first half is chosen.
    groups = [k % 2 for k in range(count)]
    signs = [1.0 if k < count / 2 else -1.0 for k in range(count)]
    # An example for every token: pairs of several turns, as many sequences.
    made = grouped(new, old, signs, list(range(count)), groups)
    margins = [
        sum(
            signs[k] * (made.logprobs[k] - made.old_logprobs[k])
            for k in range(count)
            if groups[k] == g
        )
        for g in (0, 1)
    ]
    plain = sum(-torch.nn.functional.logsigmoid(beta * torch.as_tensor(m)) for m in margins)
    (wanted,) = autograd.grad(plain, made.logprobs)
    # The learner's mean is over sequences, that of DPO over pairs.
    scale = count / len(set(groups))
    assert weighed(DPO(beta), made) == pytest.approx((scale * wanted).tolist(), abs=1e-5)


def test_dpo_at_its_reference() -> None:
    # sigmoid(0) = 1/2: every token is pulled by beta / 2, over the two sequences of its pair.
    made = grouped([-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0], [1.0, 1.0, -1.0], [0, 0, 1], [4, 4, 4])
    assert weighed(DPO(0.1), made) == pytest.approx([-0.1, -0.1, 0.1])


def test_sums_over_groups_and_over_what_follows() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    assert sums(values, torch.tensor([5, 0, 5, 0, 2])).tolist() == [5, 10, 5, 10, 16]
    assert following(values, torch.tensor([0, 0, 0, 1, 1])).tolist() == [6, 4, 0, 16, 0]


def distributions(
    mine: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], said: Sequence[int]
) -> tuple[TokenArrays, torch.Tensor]:
    """Arrays of a policy and a teacher with those probabilities; and the policy's logits."""
    logits = torch.tensor(mine).log().requires_grad_()
    distribution = logits.log_softmax(-1)
    chosen = distribution[torch.arange(len(said)), torch.tensor(said)]
    made = TokenArrays(
        chosen,
        chosen.detach(),
        torch.ones(len(said)),
        examples=torch.zeros(len(said), dtype=torch.int64),
        distribution=distribution,
        teacher=torch.tensor(theirs).log(),
        states=torch.ones(len(said), 2),
    )
    return made, logits


def saying(*values: Sequence[float]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A critic with those values, a row per state."""
    return lambda states: torch.tensor(values)


def test_moment_gaps_by_hand() -> None:
    made, _ = distributions([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]], [[0.2, 0.3, 0.5]] * 2, [0, 1])
    # |0.2 - 0.5| + 0 + |0.5 - 0.2|; 0.1 + 0.5 + 0.4.
    assert MomentGap("t")(made).tolist() == pytest.approx([0.6, 1.0], abs=1e-6)
    # On its own states the first token also answers for the second one's gap.
    own = MomentGap("t", own=True)(made).tolist()
    assert own == pytest.approx([0.6 + math.log(0.5) * 1.0, 1.0], abs=1e-6)
    values = [[1.0, 0.0, -1.0], [0.0, 0.5, 0.0]]
    seen = MomentGap("t", critic=saying(*values), weight=2.0)(made).tolist()
    assert seen == pytest.approx([2 * (-0.3 - 0.3), 2 * 0.5 * (0.3 - 0.8)], abs=1e-6)


probabilities = st.lists(st.floats(0.05, 1), min_size=3, max_size=3).map(
    lambda given: [x / sum(given) for x in given]
)


@given(probabilities, probabilities, st.lists(st.floats(-1, 1), min_size=3, max_size=3))
def test_no_bounded_critic_sees_more_than_the_exact_gap(
    mine: list[float], theirs: list[float], values: list[float]
) -> None:
    autograd: Any = torch.autograd
    made, _ = distributions([mine], [theirs], [0])
    (most,) = MomentGap("t")(made).tolist()
    (seen,) = MomentGap("t", critic=saying(values))(made).tolist()
    assert seen <= most + 1e-5
    same, _ = distributions([theirs], [theirs], [0])
    for own in (False, True):
        for critic in (None, saying(values)):
            alike = MomentGap("t", own, critic=critic)(same).tolist()
            assert alike == pytest.approx([0.0], abs=1e-5)
    # A critic that does not look at the action has nothing to teach.
    made, logits = distributions([mine], [theirs], [0])
    blind = MomentGap("t", critic=saying([values[0]] * 3))(made).sum()
    (slope,) = autograd.grad(blind, logits)
    assert slope.abs().max() < 1e-6


@given(st.lists(st.floats(-5, 0), min_size=1, max_size=9), st.floats(0.1, 3))
def test_sequences_of_one_reward_are_cloned(logprobs: list[float], reward: float) -> None:
    """At the policy that sampled them: the gradient of that multiple of their likelihood."""
    groups = [k // 3 for k in range(len(logprobs))]
    made = grouped(logprobs, logprobs, [reward] * len(logprobs), groups)
    assert weighed(SequenceClip(), made) == pytest.approx([-reward] * len(logprobs), rel=1e-5)
