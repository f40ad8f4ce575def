"""Losses: frozen settings that are also functions from (N,) token arrays to (N,) token losses."""

from dataclasses import dataclass
from typing import Any, Literal

from ..core.types import Aggregation, TokenArrays


@dataclass(frozen=True)
class NLL:
    """Advantage-weighted negative log-likelihood: the weight multiplies a sequence's own mean.

    The default aggregation, mean over sequences of token means, is RISE's and plain SFT's: a
    long completion weighs as much as a short one.
    """

    aggregation: Aggregation = "seq-mean-token-mean"
    length: int = 1
    needs_reference: bool = False

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
    estimator: Literal["k1", "k2", "k3"] = "k3"
    aggregation: Aggregation = "token-mean"
    length: int = 1

    @property
    def needs_reference(self) -> bool:
        return self.kl > 0

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
        return loss


def kl(logprobs: Any, reference: Any, estimator: Literal["k1", "k2", "k3"]) -> Any:
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
            return d.exp() - d - 1
