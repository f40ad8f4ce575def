"""What a server of vLLM's answers to canaries."""

from collections.abc import Sequence

from ...core.models.canary import Canary
from .vllm_request import SCORING, scores
from .vllm_server import Replica


async def spoken(replica: Replica, model: str, canaries: Sequence[Canary]) -> tuple[float, ...]:
    """What their tokens are worth there; also a proof that it knows our tokens.

    Raises: as ``Replica.post``.
    """
    found: list[float] = []
    for one in _asked(replica, canaries):
        answer = await replica.answer(model, one.ids, one.images, SCORING, first=True)
        found += scores(answer, one.asked)
    return tuple(found)


def expected(replica: Replica, canaries: Sequence[Canary]) -> tuple[float, ...]:
    """What it has to answer."""
    return tuple(value for one in _asked(replica, canaries) for value in one.logprobs)


def _asked(replica: Replica, canaries: Sequence[Canary]) -> list[Canary]:
    """Those that the server can be asked about: some take no pictures beside ids."""
    return [one for one in canaries if replica.generates or not one.pictured]
