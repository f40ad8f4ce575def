"""Canaries: what a model itself would go on with, and what weights in training say of that."""

from collections.abc import Sequence

import torch

from ...core.errors import PromptError
from ...core.models.canary import BEGIN, LENGTH, Canary, shown, usual_ids
from ...core.models.open import open_tokens
from ...core.models.tokens import PAD, ChatTokens
from ...core.types import Image, Message, Prompt
from .pack import Row, Span
from .reader import Reader

QUESTION = "What is this?"


class Canaries:
    """One of text, and for models that see one of a picture.

    Their tokens are drawn once, from the model as it is then: of unlikely tokens log-probabilities
    differ far more between two ways to compute them, in bf16 above all, and are never sampled.
    """

    def __init__(
        self, reader: Reader, tokens: ChatTokens, base: str, trust_remote_code: bool = False
    ) -> None:
        """``base``: what the model was opened as."""
        self._rows: list[tuple[Row, tuple[int, ...]]] = []
        """What is read here, and the same as it is asked about elsewhere."""
        begin = usual_ids(tokens.tokenizer, BEGIN)
        self._add(reader, tokens, begin, begin, ())
        if tokens.vision is None:
            return
        elsewhere = open_tokens(base, trust_remote_code, tokens.vision.placeholder)
        image = shown()
        prompt = Prompt((Message("user", (image, QUESTION)),))
        try:
            here, there = tokens.prompt(prompt), elsewhere.prompt(prompt)
        except PromptError:  # A template that wants other messages; nobody's prompt is this one.
            return
        self._add(reader, tokens, here, there, (image,))

    def _add(
        self,
        reader: Reader,
        tokens: ChatTokens,
        here: Sequence[int],
        there: Sequence[int],
        images: tuple[Image, ...],
    ) -> None:
        barred = sorted(tokens.tokenizer.added_tokens_decoder)
        drawn = likely(reader, here, images, barred)
        row = Row([*here, *drawn], images)
        row.spans.append(Span(len(here), len(row.ids), 0.0, (), 0))
        self._rows.append((row, (*there, *drawn)))

    def now(self, reader: Reader) -> list[Canary]:
        """What the weights say of them at present."""
        found: list[Canary] = []
        with torch.no_grad():
            for row, ids in self._rows:
                layout = reader.layout([row])
                logprobs = reader.logprobs(reader.states(layout), layout.targets)
                found.append(Canary(ids, tuple(map(float, logprobs)), bool(row.images)))
        return found


def likely(
    reader: Reader, ids: Sequence[int], images: tuple[Image, ...], barred: Sequence[int]
) -> list[int]:
    """``LENGTH`` tokens that the model goes on with after ``ids``, none of ``barred``; seeded."""
    rng = torch.Generator().manual_seed(0)
    drawn: list[int] = []
    with torch.no_grad():
        for _ in range(LENGTH):
            known = [*ids, *drawn]
            row = Row([*known, PAD], images, [Span(len(known), len(known) + 1, 0.0, (), 0)])
            logits = reader.logits(reader.states(reader.layout([row])))[0].float().cpu()
            logits[[token for token in barred if token < len(logits)]] = -torch.inf
            drawn.append(int(torch.multinomial(logits.softmax(-1), 1, generator=rng)))
    return drawn
