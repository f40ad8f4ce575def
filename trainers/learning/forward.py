"""Forward passes over packed rows: what a loss sees of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ...core.errors import LearnerError, PolicyError
from ...core.models.constraints import Constraints
from ...core.models.frozen import open_frozen
from ...core.models.tokens import ChatTokens
from ...core.models.vision import eye_of
from ...core.types import DistributionLoss, Loss, Need, TokenArrays
from .head import Barred
from .pack import Row
from .reader import Reader, moved

TRAINED = {"cpu": 1 << 23, "cuda": 1 << 26}
"""The most logits of a micro-batch whose distributions are wanted whole, by kind of device."""


@dataclass
class Forward:
    """A model's passes over rows."""

    reader: Reader
    tokens: ChatTokens
    trust_remote_code: bool
    teachers: dict[str, Reader]
    """Those that are open, by name."""
    constraints: Constraints = field(init=False)

    def __post_init__(self) -> None:
        self.constraints = Constraints(self.tokens)

    @property
    def device(self) -> torch.device:
        return self.reader.device

    def groups(self, rows: Sequence[Row], loss: Loss) -> list[list[int]]:
        """Indices of ``rows`` in groups that are computed at once."""
        trained = None
        if Need.DISTRIBUTION in loss.needs:
            wide = TRAINED.get(self.device.type, TRAINED["cuda"])
            trained = max(1, wide // self.reader.head.vocabulary)
        return self.reader.groups(rows, trained)

    def arrays(self, rows: Sequence[Row], loss: Loss) -> TokenArrays:
        """What ``loss`` sees of these rows."""
        reader = self.reader
        layout = reader.layout(rows)
        states = reader.states(layout)
        barred = self._barred(rows)
        arrays = self.given(rows, reader.logprobs(states, layout.targets, barred))
        if Need.REFERENCE in loss.needs:
            with torch.no_grad(), reader.model.disable_adapter():
                other = reader.logprobs(reader.states(layout), layout.targets, barred)
            arrays = replace(arrays, reference_logprobs=other)
        if Need.DISTRIBUTION in loss.needs:
            teacher = self._teacher(cast(DistributionLoss, loss).teacher)
            with torch.no_grad():
                theirs = teacher.logits(teacher.states(teacher.layout(rows)))
            arrays = replace(
                arrays,
                distribution=reader.logits(states).log_softmax(-1),
                teacher=theirs.log_softmax(-1),
            )
        if Need.STATES in loss.needs:
            arrays = replace(arrays, states=states.detach().float())
        return arrays

    def _barred(self, rows: Sequence[Row]) -> Barred | None:
        """What the constraints that trained tokens were sampled under ruled out, if any did.

        Raises:
            LearnerError: a token that its constraint rules out.
        """
        spans = [(row, span) for row in rows for span in row.spans]
        if not any(span.constraint for _, span in spans):
            return None
        width = self.reader.head.vocabulary
        parts: list[Tensor] = []
        for row, span in spans:
            ids = row.ids[span.begin : span.end]
            allowed = np.ones((len(ids), width), np.bool_)
            if span.constraint:
                try:
                    allowed = self.constraints.masks(span.constraint, ids, width)
                except PolicyError as cause:
                    raise LearnerError(str(cause)) from cause
            parts.append(torch.as_tensor(~allowed))
        whole = torch.cat(parts)
        return lambda part: whole[part].to(self.device)

    def given(self, rows: Sequence[Row], logprobs: Tensor) -> TokenArrays:
        """What is known of the rows' tokens, beside ``logprobs``."""
        device = self.device
        spans = [span for row in rows for span in row.spans]
        sizes = [span.end - span.begin for span in spans]
        known = [
            np.array(span.old_logprobs or [np.nan] * size, np.float32)
            for span, size in zip(spans, sizes, strict=True)
        ]
        old = moved(np.concatenate([np.empty(0, np.float32), *known]), device)
        advantages, examples, groups = (
            moved(np.repeat(np.array(those, kind), sizes), device)
            for those, kind in (
                ([span.advantage for span in spans], np.float32),
                ([span.example for span in spans], np.int64),
                ([span.group for span in spans], np.int64),
            )
        )
        old = old.where(~old.isnan(), logprobs.detach())
        return TokenArrays(logprobs, old, advantages, None, examples, groups)

    def _teacher(self, name: str) -> Reader:
        """A frozen model of the same vocabulary, opened once. Raises: LearnerError: it is not."""
        if name not in self.teachers:
            mine = self.reader
            weights, tokens = open_frozen(
                name, str(self.device), mine.precision, self.trust_remote_code
            )
            sizes = [m.config.get_text_config().vocab_size for m in (mine.weights, weights)]
            if tokens.fingerprint != self.tokens.fingerprint or sizes[0] != sizes[1]:
                raise LearnerError(
                    f"the teacher {name!r} has another vocabulary ({sizes[1]} tokens) than the "
                    f"model in training ({sizes[0]}): their distributions cannot be compared; "
                    "learn from its text instead"
                )
            weights.eval()
            eye = eye_of(tokens, weights)
            self.teachers[name] = Reader(
                weights, weights, self.device, mine.budget, mine.precision, eye
            )
        return self.teachers[name]
