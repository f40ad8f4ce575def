"""Samples many completions of a causal language model at once. Knows tensors, no episodes."""

# torch's tolist and numpy's random are partly untyped.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ...core.models.constraints import Follower
from ...core.models.layers import attends_only
from ...core.models.tokens import PAD
from ...core.models.vision import Eye
from ...core.types import Image
from .attention import plain, reading, shares
from .cache import Place, PrefixCache, Read, check_used, copy_places, layers_for


@dataclass(frozen=True)
class Want:
    """One completion to sample."""

    prompt: tuple[int, ...]
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 64
    follow: Callable[[], Follower] | None = None
    """If given: begins what says which tokens are allowed, and when the completion is whole."""
    stopped: Callable[[Sequence[int]], bool] | None = None
    """Asked after every token whether the text so far is complete."""
    images: tuple[Image, ...] = ()
    """The prompt's pictures."""

    @property
    def read(self) -> Read:
        """By content: the same ids may show other pictures."""
        return self.prompt, tuple(image.sha256 for image in self.images)


@dataclass
class Sampled:
    ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    """nats, of the model's own distribution: temperature 1, no truncation, no constraint."""
    constrained: list[float] = field(default_factory=list[float])
    """nats, of its distribution over what was allowed (temperature 1); empty if all was."""
    finish: str = "length"


@torch.inference_mode()
def sample(
    model: Any,
    wants: Sequence[Want],
    ends: Set[int],
    memory: PrefixCache | None = None,
    shared: int = 0,
    eye: Eye | None = None,
) -> list[Sampled]:
    """Completions of ``wants``, in order. Equal prompts are read once, remembered ones not again.

    The result for one want depends on the others only through rounding. Models that do more than
    attend to what they have read are asked prompts of one length at a time, and remember nothing.

    ``ends``: the tokens that end a completion. ``shared``: how many ids all prompts begin with that
    are read once, and kept for others; each prompt has another behind them. ``eye``: the model's,
    if there are pictures.

    Raises:
        FloatingPointError: the model's logits are not finite.
        ValueError: the model keeps what it has read in a way of its own.
    """
    if attends_only(model):
        return _sample(model, wants, ends, memory, shared, eye)
    samples: dict[int, Sampled] = {}
    for length in dict.fromkeys(len(want.prompt) for want in wants):
        group = [k for k, want in enumerate(wants) if len(want.prompt) == length]
        found = _sample(model, [wants[k] for k in group], ends, None, 0, eye)
        samples |= zip(group, found, strict=True)
    return [samples[k] for k in range(len(wants))]


def _sample(
    model: Any,
    wants: Sequence[Want],
    ends: Set[int],
    memory: PrefixCache | None,
    shared: int,
    eye: Eye | None,
) -> list[Sampled]:
    device = model.device
    pictures = {want.read: want.images for want in wants}
    steps = max(want.max_tokens for want in wants)
    base = _beginning(model, wants[0].prompt[:shared], memory) if shared else None
    layers, real, logits, after = _read(model, pictures, steps, memory, base, eye)
    if not shares(model):
        base = None  # It was copied into every row.
    before = base.length if base else 0
    cache: Any = Cache(layers=list(layers))
    longest = real.shape[1] - steps
    padded = any(len(ids) < before + longest for ids, _ in pictures)
    place = {prompt: k for k, prompt in enumerate(pictures)}
    rows = torch.tensor([place[want.read] for want in wants], device=device)
    if len(pictures) != len(wants):
        cache.reorder_cache(rows)
    real, logits, after = real[rows], logits[rows], after[rows]
    results = [Sampled() for _ in wants]
    followers = [want.follow() if want.follow else None for want in wants]
    chooser = Chooser(wants, followers, steps, device, eye.vision.placeholder if eye else None)
    live = torch.arange(len(wants), device=device)

    def remember(finished: Tensor) -> None:
        if memory is None:
            return
        ended = [(row, k) for row, k in enumerate(_ints(live)) if finished[row]]
        # The last token sampled was never read.
        memory.keep(
            layers,
            [
                (row, (ids + tuple(results[k].ids[:-1]), images), before + longest - len(ids))
                for row, k in ended
                for ids, images in [wants[k].read]
            ],
            base,
        )

    for step in range(steps):
        tokens, logprobs, constrained = chooser(logits, live, step, results)
        running = _record(wants, followers, results, live, tokens, logprobs, constrained, ends)
        left = int(running.sum())
        if not left or step + 1 == steps:
            remember(torch.ones_like(running))
            break
        # Finished rows ride along until they are half of the batch: dropping them copies the cache.
        if left * 2 <= len(live) or left < len(live) <= 8:
            remember(~running)
            keep = running.nonzero()[:, 0].to(device)
            cache.reorder_cache(keep)
            real, live, tokens, after = real[keep], live[keep], tokens[keep], after[keep]
        mask = _mask(real[:, : longest + step + 1], 1, plain(model)) if padded else None
        logits = _forward(model, tokens[:, None], mask, (after + step)[:, None], cache)
    return results


class Seen:
    """Prompts with pictures, and who looks at those.

    What a picture's tokens are, and where, hangs on all that stands before them.
    """

    def __init__(self, eye: Eye, pictures: Mapping[Read, tuple[Image, ...]]) -> None:
        self._eye = eye
        self._images = list(pictures.values())
        ids, real = _left_padded([ids for ids, _ in pictures], 0)
        device = eye.device
        self._ids, self._real = ids.to(device), real.to(device)

    def whole_from(self, read: int) -> int:
        """How many of the last columns to read, at least ``read``, so that no picture is cut."""
        width = self._ids.shape[1]
        return width - self._eye.whole_from(self._ids, self._images, width - read)

    def given(self, read: int) -> tuple[Tensor, dict[str, Any]]:
        """The positions of the last ``read`` columns, and what else a pass over them is given."""
        positions = self._eye.positions(self._ids, self._real, self._images)
        return positions[..., -read:], self._eye.arguments(self._ids, self._images, read)


def _beginning(model: Any, ids: tuple[int, ...], memory: PrefixCache | None) -> Place:
    """Where ``ids`` are, read now unless memory has them."""
    place = memory.shared(ids) if memory else None
    if place is None:
        layers = layers_for(model, len(ids))
        row = torch.tensor([ids], device=model.device)
        positions = torch.arange(len(ids), device=model.device)[None]
        _forward(model, row, None, positions, Cache(layers=list(layers)))
        place = Place([layer.store for layer in layers], 0, 0, len(ids))
        if memory:
            memory.share(ids, place)
    return place


def _read(
    model: Any,
    pictures: Mapping[Read, tuple[Image, ...]],
    steps: int,
    memory: PrefixCache | None,
    base: Place | None,
    eye: Eye | None,
) -> tuple[list[Any], Tensor, Tensor, Tensor]:
    """The cache after prompts, which columns are real (B, T + steps), (B, V) logits, and (B,) the
    positions that follow. ``pictures``: of every prompt.

    Prompts stand flush right, without their common beginning if the model lets that stand by
    itself. What memory knows of every one of them is copied, the rest read.
    """
    prompts, seen = list(pictures), None
    if eye is not None and any(pictures.values()):
        seen = Seen(eye, pictures)
    before = base.length if base and shares(model) else 0
    own = [ids[before:] for ids, _ in prompts]
    ids, real = _left_padded(own, steps)
    ids, real = ids.to(model.device), real.to(model.device)
    longest = ids.shape[1]
    layers = layers_for(model, longest + steps)
    if base and before:
        for layer, store in zip(layers, base.stores, strict=True):
            layer.shared = store
    found = [memory.find(prompt) if memory else None for prompt in prompts]
    places = [at if at and at.behind == before else None for at in found]
    if base and not before:
        places = [at or base for at in places]
    known, remembered = 0, [at for at in places if at]
    if len(remembered) == len(prompts):
        new = max(len(p) - at.length for (p, _), at in zip(prompts, remembered, strict=True))
        known = longest - (min(longest, seen.whole_from(new)) if seen else new)
        if known:
            copy_places(layers, remembered, [longest - len(p) for p in own], known)
    padded = any(len(p) < longest for p in own)
    mask = None
    if padded or known or before:
        mask = _mask(real[:, :longest], longest - known, plain(model))
    positions = (real[:, :longest].cumsum(1) - 1).clamp(min=0)[:, known:] + before
    more: dict[str, Any] = {}
    if seen is not None:
        positions, more = seen.given(longest - known)
    logits = _forward(model, ids[:, known:], mask, positions, Cache(layers=list(layers)), more)
    check_used(layers)
    last = positions[..., -1]
    return layers, real, logits, (last.amax(0) if last.dim() > 1 else last) + 1


def _left_padded(prompts: Sequence[tuple[int, ...]], steps: int) -> tuple[Tensor, Tensor]:
    """(B, T) ids, and (B, T + steps) bool: which positions are, or will be, no padding."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), PAD)
    real = torch.ones((len(prompts), longest + steps), dtype=torch.bool)
    for k, prompt in enumerate(prompts):
        ids[k, longest - len(prompt) :] = torch.tensor(prompt)
        real[k, : longest - len(prompt)] = False
    return ids, real


def _mask(real: Tensor, queries: int, ready: bool) -> Tensor:
    """What the last ``queries`` columns of (B, K) ``real`` see: (B, 1, Q, K), or just ``real``."""
    if not ready:
        return real
    if queries == 1:
        return real[:, None, None]
    before = real.shape[1] - queries
    causal = torch.ones((queries, real.shape[1]), dtype=torch.bool, device=real.device).tril(before)
    # A padding token sees itself, so that no row of the softmax is empty.
    return (real[:, None, None] & causal) | causal.triu(before)


def _forward(
    model: Any,
    ids: Tensor,
    mask: Tensor | None,
    positions: Tensor,
    cache: Cache,
    more: Mapping[str, Any] | None = None,
) -> Tensor:
    """(B, V) float32 logits of the last position."""
    with reading(cache.layers):
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **(more or {}),
        )
    return out.logits[:, -1].float()


def _ints(numbers: Tensor) -> list[int]:
    return cast(list[int], numbers.tolist())


def _floats(numbers: Tensor) -> list[float]:
    return cast(list[float], numbers.tolist())


def _record(
    wants: Sequence[Want],
    followers: Sequence[Follower | None],
    results: list[Sampled],
    live: Tensor,
    tokens: Tensor,
    logprobs: Tensor,
    constrained: Tensor,
    ends: Set[int],
) -> Tensor:
    """Append what was sampled to the unfinished; which rows still run, (B,) bool on the CPU."""
    running: list[bool] = []
    for row, token, logprob, held in zip(
        _ints(live), _ints(tokens), _floats(logprobs), _floats(constrained), strict=True
    ):
        want, follower, result = wants[row], followers[row], results[row]
        if result.finish == "stop" or len(result.ids) >= want.max_tokens:
            running.append(False)
            continue
        if logprob != logprob:
            raise FloatingPointError("the model's logits are not finite")
        result.ids.append(token)
        result.logprobs.append(logprob)
        if follower is not None:
            result.constrained.append(held)
            follower.take(token)
        if _over(want, follower, result.ids, ends):
            result.finish = "stop"
        running.append(result.finish != "stop" and len(result.ids) < want.max_tokens)
    return torch.tensor(running)


def _over(want: Want, follower: Follower | None, ids: Sequence[int], ends: Set[int]) -> bool:
    if follower is not None:
        if want.stopped is not None:
            want.stopped(ids)
        # An end token may stand in the middle of what is allowed.
        return follower.over
    return ids[-1] in ends or (want.stopped is not None and want.stopped(ids))


class Chooser:
    """Draws the next token of every row, each from its own random stream."""

    def __init__(
        self,
        wants: Sequence[Want],
        followers: Sequence[Follower | None],
        steps: int,
        device: torch.device,
        never: int | None = None,
    ) -> None:
        """``never``: a token that is not drawn, though log-probabilities do not know of that.

        Whoever says what stands for a picture would read it as one in the next turn.
        """
        self._followers = followers
        self._never = never
        self._temperature = torch.tensor([w.temperature for w in wants], device=device)
        self._top_p = torch.tensor([w.top_p for w in wants], device=device)
        # Philox is counter-based: a stream costs nothing to start.
        draws = [
            np.random.Generator(np.random.Philox(w.seed)).random(steps)
            if w.temperature > 0
            else np.zeros(steps)
            for w in wants
        ]
        # float64: rounded to float32, one in 2^25 draws would be 1 and fall off the edge.
        self._draws = torch.from_numpy(np.stack(draws)).to(device)
        self._greedy = all(w.temperature == 0 for w in wants)
        self._truncated = any(w.top_p < 1 for w in wants)
        self._constrained = any(followers)

    def __call__(
        self, logits: Tensor, live: Tensor, step: int, results: Sequence[Sampled]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From (B, V) logits: (B,) tokens and, in nats, (B,) log-probabilities free and held."""
        logits_own = logits
        if self._constrained:
            logits = self._constrain(logits, live, results)
        held = logits
        if self._never is not None:
            logits = logits.index_fill(
                1, torch.tensor([self._never], device=logits.device), -torch.inf
            )
        tokens = logits.argmax(-1)
        if not self._greedy:
            temperature = self._temperature[live]
            hot = (temperature > 0).nonzero()[:, 0]
            scaled = logits[hot] / temperature[hot, None]
            drawn = self._draw(scaled, self._top_p[live[hot]], self._draws[live[hot], step])
            tokens[hot] = drawn
        free = _chosen(logits_own, tokens)
        return tokens, free, _chosen(held, tokens) if self._constrained else free

    def _draw(self, logits: Tensor, top_p: Tensor, draws: Tensor) -> Tensor:
        """Inverse-CDF sampling; (B,) uniform ``draws`` in [0, 1), float64."""
        probs = logits.softmax(-1)
        if self._truncated:
            ordered, order = probs.sort(-1, descending=True)
            before = ordered.cumsum(-1) - ordered
            tail = (before >= top_p[:, None]) & (top_p < 1)[:, None]
            tail[:, 0] = False
            ordered = ordered.masked_fill(tail, 0.0)
            probs = torch.zeros_like(probs).scatter(1, order, ordered)
        # float64: a long float32 sum over a large vocabulary would misplace the tail.
        edges = probs.to(torch.float64).cumsum(-1)
        total = edges[:, -1]
        # Just below the total at most: the last token found is then one that may be drawn.
        aim = torch.minimum(draws * total, torch.nextafter(total, torch.zeros_like(total)))
        found = torch.searchsorted(edges, aim[:, None], right=True)[:, 0]
        return found.clamp(max=logits.shape[-1] - 1)

    def _constrain(self, logits: Tensor, live: Tensor, results: Sequence[Sampled]) -> Tensor:
        barred = torch.zeros_like(logits)
        for row, k in enumerate(_ints(live)):
            follower = self._followers[k]
            if follower is not None and results[k].finish != "stop":
                barred[row] = -torch.inf
                barred[row, torch.from_numpy(follower.allowed()).to(barred.device)] = 0.0
        return logits + barred


def _chosen(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
