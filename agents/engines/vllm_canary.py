"""What a server of vLLM's answers to canaries, and whether that is to be believed."""

from collections.abc import Sequence
from typing import TypeAlias

from ...core.errors import PolicyError
from ...core.models.canary import Canary, distance
from .vllm_request import SCORING, scores
from .vllm_server import MODEL, Gone, Replica

Spoken: TypeAlias = tuple[tuple[float, ...], ...]
"""Log-probabilities of each canary's tokens, nats."""
UNLIKE = 1e-3
"""Nats on average: by less, two checkpoints may well be the same to a server in 16 bits."""


async def spoken(replica: Replica, model: str, canaries: Sequence[Canary]) -> Spoken:
    """What their tokens are worth there; also a proof that it knows our tokens.

    Raises: as ``Replica.post``.
    """
    found: list[tuple[float, ...]] = []
    for one in canaries:
        if not one.pictured or await _sees(replica, one):
            answer = await replica.answer(model, one.ids, one.images, SCORING, first=True)
            found.append(scores(answer, one.asked))
    return tuple(found)


async def _sees(replica: Replica, canary: Canary) -> bool:
    """Whether the server takes that picture: some take none beside ids, or have no room for it."""
    if replica.sees is None and replica.generates:
        try:
            await replica.answer(MODEL, canary.ids, canary.images, SCORING, first=True)
            replica.sees = True
        except Gone:
            raise
        except PolicyError:
            replica.sees = False
    return bool(replica.sees)


async def doubts(
    replica: Replica,
    name: str,
    answers: Spoken,
    canaries: Sequence[Canary],
    before: Sequence[Canary],
    tolerance: float,
) -> str:
    """Why ``answers``, the answers of the adapter ``name``, are not its own; empty if they are.

    ``before``: the canaries of the adapter that it had last, whose answers are ``replica.spoken``.
    """
    wanted, last = (
        tuple(one.logprobs for one in those if not one.pictured or replica.sees)
        for those in (canaries, before)
    )
    gap = max(distance(*pair) for pair in zip(answers, wanted, strict=True))
    if gap > tolerance:
        how = "otherwise than it should"
        if answers == await spoken(replica, MODEL, canaries):
            how = "as its base model does: the adapter's weights have names it does not know"
        elif answers == replica.spoken:
            how = "as its last adapter does: the new one is not in use"
        return (
            f"the canary failed: {replica.url} answers {how}; its log-probabilities are "
            f"{gap:.3g} nats from the learner's on average, more than "
            f"canary_tolerance={tolerance:g} allows"
        )
    moved = len(last) == len(wanted) and any(
        distance(*pair) > UNLIKE for pair in zip(last, wanted, strict=True)
    )
    if moved and answers == replica.spoken:
        return (
            f"the canary failed: {replica.url} still answers with its last adapter, though the "
            "learner has changed"
        )
    return ""
