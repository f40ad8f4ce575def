"""Log-probabilities from hidden states, a chunk of tokens at a time.

Logits are as wide as the vocabulary, and a long answer's would take gigabytes; nobody needs more of
them at once than a few. The slope of log p(t | h) by h is W_t - sum_v p_v W_v (and whatever comes
behind the head): where the head is frozen it is found on the way forward, the chunk's logits being
at hand, so that nothing is computed twice and nothing wide is kept. A head that is trained computes
its chunks again on the way back.
"""

# torch is partly untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Callable
from functools import cache, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

LOGITS = {"cpu": 1 << 22, "cuda": 1 << 27}
"""The most logits held at once, by kind of device: 16 and 512 MiB in float32."""
TILE = 128
"""Chunks of more tokens are whole multiples of it: a GPU computes so many at once."""
Barred: TypeAlias = Callable[[slice], Tensor | None]
"""(n, V) bool of a part of the tokens: what they could not have been."""


class Head:
    """A model's last layer, and what it does to its logits."""

    def __init__(self, weights: Any) -> None:
        self._layer: Any = weights.get_output_embeddings()
        config = weights.config.get_text_config()
        self.vocabulary: int = config.vocab_size
        self.scale = 1.0
        """By what else they are multiplied."""
        # What some models do to their logits: Granite, Cohere, Gemma 2.
        self._behind: list[Callable[[Tensor], Tensor]] = []
        if (by := getattr(config, "logits_scaling", None)) not in (None, 1):
            self._behind.append(lambda logits: logits / by)
        if (times := getattr(config, "logit_scale", None)) not in (None, 1):
            self._behind.append(lambda logits: logits * times)
        if cap := getattr(config, "final_logit_softcapping", None):
            self._behind.append(lambda logits: (logits / cap).tanh() * cap)

    def logits(self, states: Tensor) -> Tensor:
        """(N, V) float32, as the model returns them, from (N, D)."""
        logits = self._layer(states).float()
        for after in self._behind:
            logits = after(logits)
        return logits if self.scale == 1 else logits * self.scale

    def logprobs(self, states: Tensor, targets: Tensor, barred: Barred | None = None) -> Tensor:
        """(N,) float32 nats of (N,) tokens, from (N, D) states that predict them."""
        trained = any(one.requires_grad for one in self._layer.parameters())
        learned = torch.is_grad_enabled() and (states.requires_grad or trained)
        if learned and not trained:
            return _Sloped.apply(states, *self._sloped(states.detach(), targets, barred))
        if not learned:
            values = states.new_empty(len(states), dtype=torch.float32)
            for part in self._chunks(len(states)):
                values[part] = self._logprobs(states[part], targets[part], part, barred)
            return values
        # What is trained keeps none of its logits either: they are made anew.
        run: Any = partial(checkpoint, self._logprobs, use_reentrant=False)
        return torch.cat(
            [run(states[part], targets[part], part, barred) for part in self._chunks(len(states))]
        )

    def _chunks(self, count: int) -> list[slice]:
        """At least one, though it hold nothing."""
        most = LOGITS.get(self._layer.weight.device.type, LOGITS["cuda"]) // self.vocabulary
        most = max(most // TILE * TILE or most, 1)
        return [slice(at, min(at + most, count)) for at in range(0, max(count, 1), most)]

    def _logprobs(
        self, states: Tensor, targets: Tensor, part: slice, barred: Barred | None
    ) -> Tensor:
        logits = held(self.logits(states), barred, part)
        # Of all ways to say this, the one that holds the fewest copies of the logits.
        return -functional.cross_entropy(logits, targets, reduction="none")

    def _sloped(
        self, states: Tensor, targets: Tensor, barred: Barred | None
    ) -> tuple[Tensor, Tensor]:
        """(N,) log-probabilities, and (N, D) their slopes by the states."""
        plain = not self._behind and self.scale == 1 and type(self._layer) is torch.nn.Linear
        # Made before the first chunk: in between they would lie in the room it leaves, and the next
        # would want room anew.
        values = states.new_empty(len(states), dtype=torch.float32)
        slopes = torch.empty_like(states)
        for part in self._chunks(len(states)):
            if plain:
                with torch.no_grad():
                    logits = held(self._layer(states[part]).float(), barred, part)
                    value, apart = _apart(logits, targets[part], self._layer.weight.dtype)
                    slope = apart @ self._layer.weight
            else:
                with torch.enable_grad():
                    at = states[part].requires_grad_()
                    value = self._logprobs(at, targets[part], part, barred)
                    # Each is a function of its own state only.
                    (slope,) = torch.autograd.grad(value.sum(), at)
            values[part], slopes[part] = value.detach(), slope
        return values, slopes


class _Sloped(torch.autograd.Function):
    """Values whose slopes by the states are known."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, values: Tensor, slopes: Tensor) -> Tensor:
        ctx.save_for_backward(slopes)
        ctx.kind = states.dtype
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return (grads[0][:, None] * slopes).to(ctx.kind), None, None


def held(logits: Tensor, barred: Barred | None, part: slice) -> Tensor:
    """(n, V) logits of a part of the tokens, without what is barred."""
    ruled_out = barred(part) if barred else None
    return logits if ruled_out is None else logits.masked_fill(ruled_out, -torch.inf)


def _apart(logits: Tensor, targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(n,) log-probabilities of the targets; (n, V) one-hot targets less all probabilities."""
    if logits.device.type == "cuda" and (fused := _fused()) is not None:
        return fused(logits, targets, dtype)
    total = logits.logsumexp(-1)
    found = logits.gather(1, targets[:, None])[:, 0] - total
    apart = logits.sub_(total[:, None]).exp_().neg_()
    apart[torch.arange(len(targets), device=apart.device), targets] += 1
    return found, apart.to(dtype)


@cache
def _fused() -> Any:
    """The same in two passes over the logits; None: nothing can be compiled on this machine."""

    def apart(logits: Tensor, targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        total = logits.logsumexp(-1)
        found = logits.gather(1, targets[:, None])[:, 0] - total
        here = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
        return found, (here.float() - (logits - total[:, None]).exp()).to(dtype)

    compiled: Any = torch.compile(apart, dynamic=True)
    some = torch.zeros(2, 4, device="cuda")
    try:
        compiled(some, some[:, 0].long(), torch.bfloat16)
    except RuntimeError:
        return None
    return compiled
