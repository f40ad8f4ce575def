"""Forward passes over packed rows: what a loss sees of them."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicCache

from ...core.errors import LearnerError, PolicyError
from ...core.models.constraints import Constraints
from ...core.models.open import open_model
from ...core.models.tokens import PAD, ChatTokens
from ...core.models.vision import Eye, eye_of
from ...core.types import DistributionLoss, Loss, Need, TokenArrays
from .pack import Row, micro_batches, shared

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
    teachers: dict[str, tuple[Any, Eye | None]]
    """Those that are open, by name, and what looks at pictures for them."""
    eye: Eye | None = None
    """What looks at pictures, if it sees."""
    eye_learns: bool = False
    constraints: Constraints = field(init=False)
    head: Any = field(init=False)
    layers: Any = field(init=False)
    last: Any = field(init=False)
    """The last layer's MLP, if it, too, need not see more than trained positions."""

    def __post_init__(self) -> None:
        self.constraints = Constraints(self.tokens)
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
        trained = max(1, logits // self.sizes.vocab_size)
        return micro_batches(rows, self.budget, trained, self.alike(rows))

    def alike(self, rows: Sequence[Row]) -> int:
        """How much of their beginning is read once for all ``rows``.

        Only by models that do nothing but attend, and not where layers run again for their
        gradients, which keeps no keys and values.
        """
        kinds = getattr(self.sizes, "layer_types", None) or ["full_attention"]
        plain = set(kinds) == {"full_attention"} and not getattr(self.sizes, "kv_lora_rank", None)
        if not plain or self.checkpointed:
            return 0
        return shared(rows, self.eye.vision.placeholder if self.eye else None)

    def arrays(self, rows: Sequence[Row], loss: Loss) -> TokenArrays:
        """What ``loss`` sees of these rows."""
        ids, where = self._tensors(rows)
        alike = self.alike(rows)
        seen = self._seen(rows, ids, alike, self.eye)
        logits, states = self.logits(self.model, self.head, self.last, ids, where, alike, seen)
        barred = self._barred(rows, logits.shape[1])
        # Of all ways to say this, the one that holds the fewest copies of the logits.
        logprobs = -functional.cross_entropy(held(logits, barred), ids[where], reduction="none")
        arrays = self.given(rows, logprobs)
        if Need.REFERENCE in loss.needs:
            with torch.no_grad(), self.model.disable_adapter():
                if self.eye_learns:  # The base looks with its own eye.
                    seen = self._seen(rows, ids, alike, self.eye)
                other, _ = self.logits(self.model, self.head, self.last, ids, where, alike, seen)
                other = held(other, barred)
                reference = -functional.cross_entropy(other, ids[where], reduction="none")
            arrays = replace(arrays, reference_logprobs=reference)
        if Need.DISTRIBUTION in loss.needs:
            teacher, eye = self._teacher(cast(DistributionLoss, loss).teacher)
            with torch.no_grad():
                head = teacher.get_output_embeddings()
                theirs, _ = self.logits(
                    teacher, head, None, ids, where, 0, self._seen(rows, ids, 0, eye)
                )
            arrays = replace(
                arrays,
                distribution=logits.log_softmax(-1),
                teacher=theirs.log_softmax(-1),
            )
        if Need.STATES in loss.needs:
            arrays = replace(arrays, states=states.detach().float())
        return arrays

    def _seen(
        self, rows: Sequence[Row], ids: Tensor, alike: int, eye: Eye | None
    ) -> dict[str, Any]:
        """What a pass is given for the pictures of ``rows``, behind their first ``alike`` ids."""
        images = [row.images for row in rows]
        if eye is None or not any(images):
            return {}
        lengths = torch.tensor([len(row.ids) for row in rows], device=self.device)
        real = torch.arange(ids.shape[1], device=self.device)[None] < lengths[:, None]
        with torch.set_grad_enabled(self.eye_learns and torch.is_grad_enabled()):
            return eye.given(ids, images, real, ids.shape[1] - alike)

    def _barred(self, rows: Sequence[Row], width: int) -> Tensor | None:
        """(N, V) what the constraints that trained tokens were sampled under ruled out, if any.

        Raises:
            LearnerError: a token that its constraint rules out.
        """
        spans = [(row, span) for row in rows for span in row.spans]
        if not any(span.constraint for _, span in spans):
            return None
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
        return torch.cat(parts).to(self.device)

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

    def _teacher(self, name: str) -> tuple[Any, Eye | None]:
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
            self.teachers[name] = weights.eval(), eye_of(tokens, weights)
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
        self,
        model: Any,
        head: Any,
        last: Any,
        ids: Tensor,
        where: tuple[Tensor, Tensor],
        alike: int = 0,
        seen: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(N, V) float32, and (N, D) what the head made them from, that predict these tokens.

        No mask is needed: padding stands on the right of a causal row. The first ``alike`` columns
        are the same in all rows and are read once, their gradients added up.
        """
        rows, at = where
        mixed = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"
        )
        given: dict[str, Any] = {"use_cache": False, **(seen or {})}
        if alike:
            cache = DynamicCache(config=model.config)
            with mixed:
                model(input_ids=ids[:1, :alike], past_key_values=cache, logits_to_keep=1)
            cache.batch_repeat_interleave(len(ids))
            given |= {"past_key_values": cache, "use_cache": True}
        with only(head, last, rows, at - 1 - alike) as read, mixed:
            logits = model(input_ids=ids[:, alike:], **given).logits.float()
        return logits, read[0]


def held(logits: Tensor, barred: Tensor | None) -> Tensor:
    """(N, V) logits, without what is barred."""
    return logits if barred is None else logits.masked_fill(barred, -torch.inf)


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
