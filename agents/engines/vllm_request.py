"""What vLLM's servers are asked, and what their answers come to."""

from collections.abc import Callable, Sequence, Set
from typing import Any

from ...core.models.constraints import in_any_tokens
from ...core.types import Sampling
from .vllm_server import Answer

SCORING = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
"""How to ask for log-probabilities of what is there already."""


def request(sampling: Sampling, seed: int, most: int, ends: Set[int]) -> dict[str, Any]:
    """At most ``most`` tokens; each of ``ends`` ends the answer."""
    asked: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": most,
        "seed": seed % 2**31,
        "stop_token_ids": sorted(ends),
        "logprobs": 0,
    }
    if held := sampling.constraint:
        asked["structured_outputs"] = {"grammar": in_any_tokens(held).grammar}
    elif sampling.stop:
        asked["stop"] = list(sampling.stop)
    return asked


def after(
    before: Answer, heard: Callable[[Sequence[int]], None] | None
) -> Callable[[Sequence[int]], None] | None:
    """Hears of an answer that goes on from another as of one."""
    return None if heard is None else lambda ids: heard((*before.ids, *ids))


def scores(answer: Answer, ids: Sequence[int]) -> tuple[float, ...]:
    """(T,) nats, of these tokens at the end of what was asked about."""
    last = answer.prompt[-len(ids) :]
    return tuple(float(one[str(k)]["logprob"]) for one, k in zip(last, ids, strict=True))
