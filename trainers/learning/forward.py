"""Forward passes over packed rows: what a loss sees of them."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from ...core.errors import LearnerError
from ...core.models.open import open_model
from ...core.models.tokens import PAD, ChatTokens
from ...core.types import DistributionLoss, Loss, Need, TokenArrays
from .pack import Row, micro_batches

LOGITS = {"cpu": 1 << 23, "cuda": 1 << 26}
"""The most logits held at once, by kind of device: 32 and 256 MiB in float32."""


@dataclass
class Forward:
    """A model's passes; its head sees only trained positions."""

    model: Any
    """With its adapter, if it has one."""
    weights: Any
    """The causal language model itself."""
    tokens: ChatTokens
    device: torch.device
    budget: int
    """Padded tokens per micro-batch."""
    precision: str
    checkpointed: bool
    trust_remote_code: bool
    teachers: dict[str, Any]
    """Those that are open, by name."""
    head: Any = field(init=False)
    layers: Any = field(init=False)
    last: Any = field(init=False)
    """The last layer's MLP, if it, too, need not see more than trained positions."""

    def __post_init__(self) -> None:
        self.head = self.weights.get_output_embeddings()
        self.layers = getattr(self.weights.get_decoder(), "layers", None) or ()
        last = getattr(self.layers[-1], "mlp", None) if self.layers else None
        # What is checkpointed runs again when the hooks are gone; experts want whole sequences.
        usual = not self.checkpointed and not hasattr(last, "experts")
        self.last = last if usual else None

    @property
    def sizes(self) -> Any:
        """The model's config, where its widths stand."""
        return self.model.config.get_text_config()

    def groups(self, rows: Sequence[Row]) -> list[list[int]]:
        """Indices of ``rows`` in groups that are computed at once."""
        logits = LOGITS.get(self.device.type, LOGITS["cuda"])
        return micro_batches(rows, self.budget, max(1, logits // self.sizes.vocab_size))

    def arrays(self, rows: Sequence[Row], loss: Loss) -> TokenArrays:
        """What ``loss`` sees of these rows."""
        ids, where = self._tensors(rows)
        logits, states = self.logits(self.model, self.head, self.last, ids, where)
        # Of all ways to say this, the one that holds the fewest copies of the logits.
        logprobs = -functional.cross_entropy(logits, ids[where], reduction="none")
        arrays = self.given(rows, logprobs)
        if Need.REFERENCE in loss.needs:
            with torch.no_grad(), self.model.disable_adapter():
                other, _ = self.logits(self.model, self.head, self.last, ids, where)
                reference = -functional.cross_entropy(other, ids[where], reduction="none")
            arrays = replace(arrays, reference_logprobs=reference)
        if Need.DISTRIBUTION in loss.needs:
            teacher = self._teacher(cast(DistributionLoss, loss).teacher)
            with torch.no_grad():
                theirs, _ = self.logits(teacher, teacher.get_output_embeddings(), None, ids, where)
            arrays = replace(
                arrays,
                distribution=logits.log_softmax(-1),
                teacher=theirs.log_softmax(-1),
            )
        if Need.STATES in loss.needs:
            arrays = replace(arrays, states=states.detach().float())
        return arrays

    def given(self, rows: Sequence[Row], logprobs: Tensor) -> TokenArrays:
        """What is known of the rows' tokens, beside ``logprobs``."""
        device = self.device
        known = [s.old_logprobs or [torch.nan] * (s.end - s.begin) for r in rows for s in r.spans]
        old = torch.tensor([x for span in known for x in span], device=device)
        spans = [s for r in rows for s in r.spans for _ in range(s.begin, s.end)]
        advantages = torch.tensor([s.advantage for s in spans], device=device, dtype=torch.float32)
        examples, groups = (
            torch.tensor(those, device=device)
            for those in ([s.example for s in spans], [s.group for s in spans])
        )
        old = old.where(~old.isnan(), logprobs.detach())
        return TokenArrays(logprobs, old, advantages, None, examples, groups)

    def _teacher(self, name: str) -> Any:
        """A frozen model of the same vocabulary, opened once. Raises: LearnerError: it is not."""
        if name not in self.teachers:
            dtype = self.precision
            weights, tokens = open_model(name, str(self.device), dtype, self.trust_remote_code)
            sizes = [m.config.get_text_config().vocab_size for m in (self.model, weights)]
            if tokens.fingerprint != self.tokens.fingerprint or sizes[0] != sizes[1]:
                raise LearnerError(
                    f"the teacher {name!r} has another vocabulary ({sizes[1]} tokens) than the "
                    f"model in training ({sizes[0]}): their distributions cannot be compared; "
                    "learn from its text instead"
                )
            self.teachers[name] = weights.eval()
        return self.teachers[name]

    def _tensors(self, rows: Sequence[Row]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(B, T) ids, padded on the right, and (N,), (N,): row and position of trained tokens."""
        longest = max((len(row.ids) for row in rows), default=1)
        ids = torch.tensor([row.ids + [PAD] * (longest - len(row.ids)) for row in rows] or [[PAD]])
        spots = [
            (k, at)
            for k, row in enumerate(rows)
            for span in row.spans
            for at in range(span.begin, span.end)
        ]
        place = torch.tensor(spots, dtype=torch.long).reshape(-1, 2).to(self.device)
        return ids.to(self.device), (place[:, 0], place[:, 1])

    def logits(
        self, model: Any, head: Any, last: Any, ids: Tensor, where: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(N, V) float32, and (N, D) what the head made them from, that predict these tokens.

        No mask is needed: padding stands on the right of a causal row.
        """
        rows, at = where
        mixed = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"
        )
        with only(head, last, rows, at - 1) as read, mixed:
            logits = model(input_ids=ids, use_cache=False).logits.float()
        return logits, read[0]


@contextmanager
def only(head: Any, last: Any, rows: Tensor, at: Tensor) -> Generator[list[Tensor]]:
    """A model's ``head`` gets (N, D) hidden states of these positions in place of (B, T, D).

    So does ``last``, the last layer's MLP, if given, as (1, N, D): nobody reads what it makes of
    other positions. What the head read is put into the list.
    """

    def select(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        read.append(args[0][rows, at])
        return (read[-1],)

    def select_one(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shape.append(args[0].shape)
        return (args[0][rows, at][None],)

    def put_back(_: Any, __: Any, output: Tensor) -> Tensor:
        return output.new_zeros(shape.pop()).index_put((rows, at), output[0])

    read: list[Tensor] = []
    shape: list[torch.Size] = []
    hooks = [head.register_forward_pre_hook(select)]
    if last is not None:
        hooks.append(last.register_forward_pre_hook(select_one))
        hooks.append(last.register_forward_hook(put_back))
    try:
        yield read
    finally:
        for hook in hooks:
            hook.remove()
