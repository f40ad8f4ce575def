"""Samples many completions of a causal language model at once. Knows tensors, nothing of episodes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


@dataclass(frozen=True)
class Want:
    """One completion to sample."""

    prompt: tuple[int, ...]
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 64
    choices: tuple[tuple[int, ...], ...] = ()
    """If given: the ids the completion may consist of, each ending in the end token."""
    stopped: Callable[[Sequence[int]], bool] | None = None
    """Asked after every token whether the text so far is complete."""


@dataclass
class Sampled:
    ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    """nats, of the model's own distribution: temperature 1, no truncation, no constraint."""
    finish: str = "length"


class RoomyLayer(DynamicLayer):
    """A cache layer that writes into room reserved ahead, instead of copying itself every token."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._length = 0
        self._store: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        batch, heads, new, width = key_states.shape
        if self._store is None:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
            self._store = (
                key_states.new_empty(batch, heads, self._room, width),
                value_states.new_empty(batch, heads, self._room, value_states.shape[-1]),
            )
        end = self._length + new
        for store, states in zip(self._store, (key_states, value_states), strict=True):
            store[:, :, self._length : end] = states
        self._length = end
        self.keys, self.values = (store[:, :, :end] for store in self._store)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self._length

    def batch_select_indices(self, indices: Tensor) -> None:
        assert self._store is not None
        keys, values = (store.index_select(0, indices) for store in self._store)
        self._store = (keys, values)
        self.keys, self.values = (store[:, :, : self._length] for store in self._store)


@torch.inference_mode()
def sample(model: Any, wants: Sequence[Want], end: int, pad: int) -> list[Sampled]:
    """Completions of ``wants``, in order. Equal prompts are read once.

    The result for one want depends on the others only through rounding.
    """
    device = model.device
    prompts = list(dict.fromkeys(want.prompt for want in wants))
    place = {prompt: k for k, prompt in enumerate(prompts)}
    longest = max(map(len, prompts))
    steps = max(want.max_tokens for want in wants)
    ids = torch.full((len(prompts), longest), pad)
    real = torch.zeros((len(prompts), longest + steps), dtype=torch.bool)
    for k, prompt in enumerate(prompts):
        ids[k, longest - len(prompt) :] = torch.tensor(prompt)
        real[k, longest - len(prompt) : longest] = True
    real[:, longest:] = True
    ids, real = ids.to(device), real.to(device)
    causal = torch.ones((longest, longest), dtype=torch.bool, device=device).tril()
    # A padding token sees itself, so that no row of the softmax is empty.
    mask = (real[:, None, None, :longest] & causal) | torch.eye(
        longest, dtype=torch.bool, device=device
    )
    even = all(len(prompt) == longest for prompt in prompts)
    layers = [RoomyLayer(longest + steps) for _ in range(model.config.num_hidden_layers)]
    cache = Cache(layers=list(layers))
    positions = (real[:, :longest].cumsum(1) - 1).clamp(min=0)
    logits = _forward(model, ids, None if even else mask, positions, cache)
    rows = torch.tensor([place[want.prompt] for want in wants], device=device)
    if len(prompts) != len(wants):
        cache.batch_select_indices(rows)
    real, logits = real[rows], logits[rows]
    lengths = torch.tensor([len(want.prompt) for want in wants], device=device)

    results = [Sampled() for _ in wants]
    chooser = Chooser(wants, steps, end, device)
    live = torch.arange(len(wants), device=device)
    for step in range(steps):
        tokens, logprobs = chooser(logits, live, step, results)
        running = _record(wants, results, live, tokens, logprobs, end)
        if not running.any():
            break
        if step + 1 == steps:
            break
        # Finished rows ride along until they are half of the batch: dropping them copies the cache.
        if int(running.sum()) * 2 <= len(live) or len(live) <= 8:
            keep = running.nonzero()[:, 0].to(device)
            cache.batch_select_indices(keep)
            real, live, tokens, lengths = real[keep], live[keep], tokens[keep], lengths[keep]
        seen = None if even else real[:, None, None, : longest + step + 1]
        logits = _forward(model, tokens[:, None], seen, (lengths + step)[:, None], cache)
    return results


def _forward(
    model: Any, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Cache
) -> Tensor:
    """(B, V) float32 logits of the last position."""
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return out.logits[:, -1].float()


def _record(
    wants: Sequence[Want],
    results: list[Sampled],
    live: Tensor,
    tokens: Tensor,
    logprobs: Tensor,
    end: int,
) -> Tensor:
    """Append what was sampled to the unfinished; which rows still run, (B,) bool on the CPU."""
    running: list[bool] = []
    for row, token, logprob in zip(live.tolist(), tokens.tolist(), logprobs.tolist(), strict=True):
        want, result = wants[row], results[row]
        if result.finish == "stop" or len(result.ids) >= want.max_tokens:
            running.append(False)
            continue
        result.ids.append(token)
        result.logprobs.append(logprob)
        if token == end or (want.stopped is not None and want.stopped(result.ids)):
            result.finish = "stop"
        running.append(result.finish != "stop" and len(result.ids) < want.max_tokens)
    return torch.tensor(running)


class Chooser:
    """Draws the next token of every row, each from its own random stream."""

    def __init__(self, wants: Sequence[Want], steps: int, end: int, device: torch.device) -> None:
        self._wants = wants
        self._temperature = torch.tensor([w.temperature for w in wants], device=device)
        self._top_p = torch.tensor([w.top_p for w in wants], device=device)
        # Philox is counter-based: a stream costs nothing to start.
        draws = [
            np.random.Generator(np.random.Philox(w.seed)).random(steps)
            if w.temperature > 0
            else np.zeros(steps)
            for w in wants
        ]
        self._draws = torch.from_numpy(np.stack(draws)).to(device, torch.float32)
        self._greedy = all(w.temperature == 0 for w in wants)
        self._truncated = any(w.top_p < 1 for w in wants)
        self._constrained = any(w.choices for w in wants)

    def __call__(
        self, logits: Tensor, live: Tensor, step: int, results: Sequence[Sampled]
    ) -> tuple[Tensor, Tensor]:
        """From (B, V) logits: (B,) tokens and (B,) log-probabilities, in nats."""
        logits_own = logits
        if self._constrained:
            logits = self._constrain(logits, live, results)
        tokens = logits.argmax(-1)
        if not self._greedy:
            temperature = self._temperature[live]
            hot = (temperature > 0).nonzero()[:, 0]
            scaled = logits[hot] / temperature[hot, None]
            drawn = self._draw(scaled, self._top_p[live[hot]], self._draws[live[hot], step])
            tokens[hot] = drawn
        chosen = logits_own.gather(1, tokens[:, None])[:, 0]
        return tokens, chosen - logits_own.logsumexp(-1)

    def _draw(self, logits: Tensor, top_p: Tensor, draws: Tensor) -> Tensor:
        """Inverse-CDF sampling; (B,) uniform ``draws`` in [0, 1)."""
        probs = logits.softmax(-1)
        if self._truncated:
            ordered, order = probs.sort(-1, descending=True)
            before = ordered.cumsum(-1) - ordered
            ordered = ordered.masked_fill(before >= top_p[:, None], 0.0)
            probs = torch.zeros_like(probs).scatter(1, order, ordered)
        # float64: a long float32 sum over a large vocabulary would misplace the tail.
        edges = probs.to(torch.float64).cumsum(-1)
        aim = draws.to(torch.float64) * edges[:, -1]
        return torch.searchsorted(edges, aim[:, None], right=True)[:, 0].clamp(
            max=logits.shape[-1] - 1
        )

    def _constrain(self, logits: Tensor, live: Tensor, results: Sequence[Sampled]) -> Tensor:
        barred = torch.zeros_like(logits)
        for row, k in enumerate(live.tolist()):
            choices = self._wants[k].choices
            if choices and results[k].finish != "stop":
                allowed = list(_continuations(choices, results[k].ids))
                barred[row] = -torch.inf
                barred[row, allowed] = 0.0
        return logits + barred


def _continuations(choices: Sequence[Sequence[int]], so_far: Sequence[int]) -> Iterator[int]:
    """The tokens that keep ``so_far`` a beginning of one of the choices."""
    at = len(so_far)
    return (
        choice[at] for choice in choices if len(choice) > at and list(choice[:at]) == list(so_far)
    )
