"""Losses: frozen settings that are also functions from (N,) token arrays to (N,) token losses."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ...core.types import Aggregation, Need, TokenArrays

KL: TypeAlias = Literal["k1", "k2", "k3"]
"""An estimator of the Kullback-Leibler divergence, as in ``kl``."""


@dataclass(frozen=True)
class NLL:
    """Advantage-weighted negative log-likelihood: the weight multiplies a sequence's own mean.

    The default aggregation, mean over sequences of token means, is RISE's and plain SFT's: a
    long completion weighs as much as a short one.
    """

    aggregation: Aggregation = "seq-mean-token-mean"
    length: int = 1

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset()

    def __call__(self, arrays: TokenArrays) -> Any:
        return -arrays.advantages * arrays.logprobs


@dataclass(frozen=True)
class Clip:
    """PPO's clipped surrogate per token (Schulman et al. 2017, arXiv:1707.06347).

    With ``dual`` > 1 the loss of tokens with a negative advantage is bounded by ``-dual * A``
    (Ye et al. 2020, arXiv:1912.09729). ``kl`` adds that multiple of an estimate of KL(pi, base).
    """

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    kl: float = 0.0
    estimator: KL = "k3"
    aggregation: Aggregation = "token-mean"
    length: int = 1
    weight: float = 1.0
    """Multiplies all of it."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.REFERENCE} if self.kl > 0 else ())

    def __call__(self, arrays: TokenArrays) -> Any:
        advantages = arrays.advantages
        # The bound is where float32 would overflow, and 0 * infinity spoil every gradient.
        ratio = (arrays.logprobs - arrays.old_logprobs).clip(max=80).exp()
        clipped = ratio.clip(1 - self.low, 1 + self.high)
        loss = -(ratio * advantages).minimum(clipped * advantages)
        if self.dual is not None:
            bounded = loss.minimum(-self.dual * advantages)
            loss = bounded.where(advantages < 0, loss)
        if self.kl > 0:
            loss = loss + self.kl * kl(arrays.logprobs, arrays.reference_logprobs, self.estimator)
        return self.weight * loss


@dataclass(frozen=True)
class CovarianceClip(Clip):
    """Clip, without a few tokens whose update would cost the most entropy.

    Those are tokens whose advantage and log-probability both stand out from the step's means
    (Clip-Cov: Cui et al. 2025, arXiv:2505.22617, as SPEAR uses it, arXiv:2509.22601). Of all
    tokens with ``above < (A - mean A)(log pi - mean log pi) < below`` that the ratio has not cut
    already, ``share`` of the step's tokens, at least one, are chosen at random and not learned.
    """

    share: float = 0.02
    above: float = 2.0
    below: float = 60.0

    @property
    def needs(self) -> frozenset[Need]:
        return super().needs | {Need.WHOLE_STEP}

    def weigh(self, arrays: TokenArrays, seed: int) -> Any:
        advantages, logprobs = arrays.advantages, arrays.logprobs
        covariance = (advantages - advantages.mean()) * (logprobs - logprobs.mean())
        ratio = (logprobs - arrays.old_logprobs).clip(max=80).exp()
        cut = (advantages > 0) & (ratio > 1 + self.high)
        cut |= (advantages < 0) & (ratio < 1 - self.low)
        standing_out = (covariance > self.above) & (covariance < self.below) & ~cut
        found: list[int] = standing_out.nonzero().flatten().tolist()
        count = min(len(found), max(1, int(self.share * len(advantages))))
        learned = (advantages == advantages).to(advantages.dtype)
        learned[random.Random(seed).sample(found, count)] = 0
        return learned


@dataclass(frozen=True)
class SequenceClip:
    """PPO's clip of whole sequences: one ratio for all of an example's tokens, their product.

    As TextGAIL has it (Wu et al. 2021, arXiv:2004.13796). A sequence is an example; its loss is
    -min(ratio A, clip(ratio) A), and that is what the sum of its tokens' gradients is of.
    """

    low: float = 0.2
    high: float = 0.2
    most: float = 10.0
    """The ratio weighs no more than this: of long texts it explodes."""
    aggregation: Aggregation = "seq-mean-token-sum"
    length: int = 1

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.WHOLE_STEP})

    def weigh(self, arrays: TokenArrays, seed: int) -> Any:
        """The sequence's ratio, 0 where it is clipped: d ratio = ratio * d log pi."""
        gaps = sums(arrays.logprobs - arrays.old_logprobs, arrays.examples)
        ratio = gaps.clip(max=math.log(self.most)).exp()
        cut = (arrays.advantages > 0) & (ratio > 1 + self.high)
        cut |= (arrays.advantages < 0) & (ratio < 1 - self.low)
        return ratio.where(~cut, ratio.new_zeros(()))

    def __call__(self, arrays: TokenArrays) -> Any:
        return -arrays.advantages * arrays.logprobs


@dataclass(frozen=True)
class DPO:
    """-log sigmoid(beta * margin) of pairs (Rafailov et al. 2023, arXiv:2305.18290).

    A pair is an ``Example.group``: the chosen one with the advantage 1, the rejected with -1. The
    margin is the sum over their tokens of advantage * (log pi - log pi_old): the reference is the
    policy that sampled them. Token losses have DPO's gradient, not its value.
    """

    beta: float = 0.1
    aggregation: Aggregation = "seq-mean-token-sum"
    length: int = 1

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.WHOLE_STEP})

    def weigh(self, arrays: TokenArrays, seed: int) -> Any:
        gaps = arrays.advantages * (arrays.logprobs - arrays.old_logprobs)
        pairs, examples = (len(those.unique()) for those in (arrays.groups, arrays.examples))
        # The mean is over sequences, two or more of them to a pair.
        share = examples / pairs
        return share * self.beta * (-self.beta * sums(gaps, arrays.groups)).sigmoid()

    def __call__(self, arrays: TokenArrays) -> Any:
        return -arrays.advantages * arrays.logprobs


@dataclass(frozen=True)
class MomentGap:
    """How far the policy is from its teacher in the eyes of a bounded critic f(state, action).

    sum_a (teacher(a) - pi(a)) f(s, a) at every state, over the whole vocabulary (AMMD: Jia 2024,
    arXiv:2406.02959). Without a ``critic`` f is the one with |f| <= 1 that sees the most: the gap
    is then sum_a |teacher(a) - pi(a)|, twice the total variation.
    """

    teacher: str
    own: bool = False
    """The states are the policy's own: that they come about hangs on its weights, too, and a token
    answers for the gaps that follow it in its example."""
    weight: float = 1.0
    critic: Any = None
    """(N, D) states to (N, V) values in [-1, 1]."""
    aggregation: Aggregation = "token-mean"
    length: int = 1

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.DISTRIBUTION} | ({Need.STATES} if self.critic else set()))

    def __call__(self, arrays: TokenArrays) -> Any:
        apart = arrays.teacher.exp() - arrays.distribution.exp()
        if self.critic is None:
            gap = apart.abs().sum(-1)
        else:
            gap = (apart * self.critic(arrays.states)).sum(-1)
        loss = gap
        if self.own:
            loss = gap + arrays.logprobs * following(gap.detach(), arrays.examples)
        return self.weight * arrays.advantages * loss


@dataclass(frozen=True)
class ContestedGap(MomentGap):
    """The same against a critic that learns."""

    @property
    def needs(self) -> frozenset[Need]:
        return super().needs | {Need.ADVERSARY}

    def meet(self, states: int, vocabulary: int, device: Any) -> Sequence[Any]:
        return self.critic.meet(states, vocabulary, device)

    def climb(self) -> None:
        self.critic.climb()


def sums(values: Any, keys: Any) -> Any:
    """(N,): each token's sum over all tokens with its key."""
    _, where = keys.unique(return_inverse=True)
    return values.new_zeros(int(where.max()) + 1).index_add(0, where, values)[where]


def following(values: Any, examples: Any) -> Any:
    """(N,): each token's sum over those after it in its example."""
    total = values.cumsum(0)
    _, counts = examples.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0) - 1
    return total[ends].repeat_interleave(counts) - total


def kl(logprobs: Any, reference: Any, estimator: KL) -> Any:
    """Per-token estimates of KL(pi, reference) from tokens sampled by pi, in nats.

    k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1, with d = log reference - log pi (Schulman 2020,
    "Approximating KL divergence"); k3 is never negative.
    """
    d = reference - logprobs
    match estimator:
        case "k1":
            return -d
        case "k2":
            return d.square() / 2
        case "k3":
            return d.expm1() - d  # Of numbers near zero all digits count.
