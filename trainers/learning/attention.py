"""Attention in forests: each token sees those before it on its own way from the root.

Registered with transformers under ``NAME``, for models that do nothing but attend. On CUDA it is
FlexAttention, which leaves out blocks that nobody may see. Elsewhere all that stands behind a
segment, one stretch of tokens, looks at it at once: nothing is copied, and no more computed than
is seen.
"""

# torch's and transformers' types are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from ...core.errors import LearnerError
from .forest import Forest, Numbers

NAME = "selfwright_forest"
BLOCK = 128
"""FlexAttention's tokens are padded to whole blocks of so many."""
COMPILED: list[Any] = []
"""FlexAttention, once a model on a GPU has been told to attend so: as it comes it would compute
every block."""
STRETCH = 512
"""The most tokens of a row that are looked at, or look, at once."""
WASTE = 1.5
"""Stretches are computed at once if that is no more than so many times their work."""


def attend(model: Any) -> None:
    """Have ``model`` attend so, wherever it is given ``tree``."""
    if torch.cuda.is_available() and not COMPILED:
        COMPILED.append(torch.compile(flex_attention, dynamic=True))
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.config.get_text_config(decoder=True)._attn_implementation = NAME


def forgo(model: Any) -> None:
    """Have ``model`` attend as transformers does."""
    model.config.get_text_config(decoder=True)._attn_implementation = "sdpa"


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    tree: "Tree | dict[int | None, BlockMask] | None" = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """(1, T, H, D) from (1, H, T, D) queries and (1, K, T, D) keys and values, K dividing H.

    Raises:
        LearnerError: the model wants more of its attention than this.
    """
    if tree is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **others
        )
    if dropout:
        raise LearnerError("dropout of attention itself is not known here")
    for name in ("softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise LearnerError(f"its attention has a {name}, which is not known here")
    if isinstance(tree, dict):
        out: Tensor = COMPILED[0](
            query, key, value, block_mask=tree[sliding_window], scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    found: Tensor = _Attention.apply(query, key, value, tree, sliding_window, scale)
    return found.transpose(1, 2).contiguous(), None


@dataclass
class Piece:
    """Keys, and the queries that look at them, computed at once."""

    queries: Any
    """An index of (H, T, ...): a stretch, or (B, Q) places,"""
    keys: Any
    """and one of the keys."""
    mask: Tensor | None
    """(..., Q, K) bool: which are seen; None: all."""
    real: Tensor | None = None
    """(B, Q) bool: which queries are no padding; None: all."""


@dataclass
class Tree:
    """What attention needs to know of a forest, made once for all layers."""

    forest: Forest
    device: torch.device
    blocks: Numbers | None = None
    """(T,) a number for tokens that all see one another, as those of one picture do for some
    models; -1: none."""
    _pieces: dict[int | None, list[Piece]] = field(default_factory=dict[int | None, list[Piece]])

    def pieces(self, window: int | None) -> list[Piece]:
        """``window``: a token sees no more than so many, itself among them."""
        if window not in self._pieces:
            leaves: list[tuple[int, int]] = []
            found: list[Piece] = []
            for one in self.forest.segments:
                # Whatever stands behind it sees all of it.
                stop = int(self.forest.ends[one.end - 1])
                if stop == one.end and one.end - one.begin <= STRETCH:
                    leaves.append((one.begin, one.end))
                    continue
                # What sees one another stays together; else it is a chain of shorter ones.
                step = one.end - one.begin if self.blocks is not None else STRETCH
                for begin in range(one.begin, one.end, step):
                    end = min(begin + step, one.end)
                    for at in range(begin, stop, STRETCH):
                        found.append(self._stretch(at, min(at + STRETCH, stop), begin, end, window))
            found += [self._batch(group, window) for group in _alike(leaves)]
            self._pieces[window] = found
        return self._pieces[window]

    def _stretch(self, at: int, to: int, begin: int, end: int, window: int | None) -> Piece:
        mask = None
        if at < end or window is not None:
            mask = self._seen(np.arange(at, to)[None], np.arange(begin, end)[None], window)[0]
        return Piece(slice(at, to), slice(begin, end), mask)

    def _batch(self, leaves: Sequence[tuple[int, int]], window: int | None) -> Piece:
        longest = max(end - begin for begin, end in leaves)
        begins, ends = np.array(leaves).T
        places = begins[:, None] + np.arange(longest)
        real = places < ends[:, None]
        places = np.where(real, places, begins[:, None])
        mask = self._seen(places, places, window, real)
        where = torch.as_tensor(places, device=self.device)
        kept = None if real.all() else torch.as_tensor(real, device=self.device)
        return Piece(where, where, mask, kept)

    def _seen(
        self, queries: Numbers, keys: Numbers, window: int | None, real: Any = None
    ) -> Tensor:
        """(B, Q, K) which keys are seen, each on the way of its query or a later one of its own."""
        depths = self.forest.depths
        apart = depths[queries][:, :, None] - depths[keys][:, None]
        seen = apart >= 0
        if window is not None:
            seen &= apart < window
        if self.blocks is not None:
            those, others = self.blocks[queries][:, :, None], self.blocks[keys][:, None]
            seen |= (those == others) & (those >= 0)
        if real is not None:
            seen &= real[:, None]
        return torch.as_tensor(seen, device=self.device)


def _alike(leaves: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Stretches in groups of about the same length."""
    groups: list[list[tuple[int, int]]] = []
    work = 0
    for one in sorted(leaves, key=lambda one: one[1] - one[0]):
        size = (one[1] - one[0]) ** 2
        if groups and size * (len(groups[-1]) + 1) <= WASTE * (work + size):
            groups[-1].append(one)
            work += size
        else:
            groups.append([one])
            work = size
    return groups


class _Attention(torch.autograd.Function):
    """A piece at a time, by a running softmax (Dao et al. 2022, arXiv:2205.14135).

    What is kept for the way back are queries, keys, values, results and the logarithm of each
    softmax's denominator: no more than a row alone would want, and no copy of what is shared.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tree: Tree,
        window: int | None,
        scale: float,
    ) -> Tensor:
        """(1, H, T, D)."""
        queries, keys, values = _grouped(query, key, value)
        top = queries.new_full((*queries.shape[:3], 1), -torch.inf)
        total = torch.zeros_like(top)
        found = values.new_zeros(*queries.shape[:3], values.shape[-1])
        for piece in tree.pieces(window):
            scores = _scores(queries, keys, piece, scale)
            before = _taken(top, piece.queries)
            most = scores.amax(-1, keepdim=True).maximum(before)
            # Of what sees nothing here nothing is known yet.
            known = most.masked_fill(most == -torch.inf, 0)
            odds = scores.sub_(known).exp_()
            left = (before - known).exp()
            sums = _taken(total, piece.queries) * left + odds.sum(-1, keepdim=True)
            mixed = _taken(found, piece.queries) * left + _by(odds, values, piece.keys)
            for where, what in ((top, most), (total, sums), (found, mixed)):
                _put(where, piece, what)
        found = (found / total).flatten(0, 1)[None].to(query.dtype)
        ctx.save_for_backward(query, key, value, found, top + total.log())
        ctx.tree, ctx.window, ctx.scale = tree, window, scale
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        query, key, value, found, spread = ctx.saved_tensors
        queries, keys, values = _grouped(query, key, value)
        upon = grads[0][0].to(queries.dtype).unflatten(0, queries.shape[:2])
        result = found[0].to(queries.dtype).unflatten(0, queries.shape[:2])
        level = (upon * result).sum(-1, keepdim=True)
        slopes = [torch.zeros_like(one) for one in (queries, keys, values)]
        for piece in ctx.tree.pieces(ctx.window):
            scores = _scores(queries, keys, piece, ctx.scale)
            odds = scores.sub_(_taken(spread, piece.queries)).exp_()
            here = _taken(upon, piece.queries)
            if piece.real is not None:
                odds *= piece.real[:, None, :, None]
            apart = _against(here, values, piece.keys).sub_(_taken(level, piece.queries))
            apart *= odds
            apart *= ctx.scale
            _add(slopes[0], piece, _by(apart, keys, piece.keys))
            _add_keys(slopes[1], piece, apart, _taken(queries, piece.queries))
            _add_keys(slopes[2], piece, odds, here)
        mine, theirs, last = slopes
        return (
            mine.flatten(0, 1)[None].to(query.dtype),
            theirs[None].to(key.dtype),
            last[None].to(value.dtype),
            *(None, None, None),
        )


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(K, H / K, T, D) queries, (K, T, D) keys and values, of float32 at least."""
    kind = torch.promote_types(query.dtype, torch.float32)
    return (
        query[0].unflatten(0, (key.shape[1], -1)).to(kind),
        key[0].to(kind),
        value[0].to(kind),
    )


def _taken(those: Tensor, where: Any) -> Tensor:
    """Of (K, G, T, D): (K, G, Q, D), or (K, B, G, Q, D) where it is a batch of stretches."""
    found = those[:, :, where]
    return found.transpose(1, 2) if found.dim() == 5 else found


def _scores(queries: Tensor, keys: Tensor, piece: Piece, scale: float) -> Tensor:
    """(K, G, Q, K) or (K, B, G, Q, K); what is not seen is minus infinite."""
    scores = _against(_taken(queries, piece.queries), keys, piece.keys).mul_(scale)
    if piece.mask is not None:
        mask = piece.mask if piece.mask.dim() == 2 else piece.mask[:, None]
        scores.masked_fill_(~mask, -torch.inf)
    return scores


def _against(those: Tensor, keys: Tensor, where: Any) -> Tensor:
    """Products of each (..., G, Q, D) with each of the keys, one matrix for all of a group."""
    flat = those.flatten(-3, -2) @ keys[:, where].transpose(-1, -2)
    return flat.unflatten(-2, those.shape[-3:-1])


def _by(weights: Tensor, values: Tensor, where: Any) -> Tensor:
    """(..., G, Q, D) sums of the values, by (..., G, Q, K) weights."""
    flat = weights.flatten(-3, -2) @ values[:, where]
    return flat.unflatten(-2, weights.shape[-3:-1])


def _put(those: Tensor, piece: Piece, what: Tensor) -> None:
    if what.dim() == 4:
        those[:, :, piece.queries] = what
    elif piece.real is None:
        those[:, :, piece.queries] = what.transpose(1, 2)
    else:
        those[:, :, piece.queries[piece.real]] = what.transpose(1, 2)[:, :, piece.real]


def _add(those: Tensor, piece: Piece, what: Tensor) -> None:
    if what.dim() == 4:
        those[:, :, piece.queries] += what
    elif piece.real is None:
        those[:, :, piece.queries] += what.transpose(1, 2)
    else:
        those[:, :, piece.queries[piece.real]] += what.transpose(1, 2)[:, :, piece.real]


def _add_keys(those: Tensor, piece: Piece, weights: Tensor, by: Tensor) -> None:
    """To (K, T, D): (..., G, Q, K) weights times (..., G, Q, D)."""
    what = weights.flatten(-3, -2).transpose(-1, -2) @ by.flatten(-3, -2)
    if what.dim() == 3 or piece.real is None:
        those[:, piece.keys] += what
    else:
        those[:, piece.keys[piece.real]] += what[:, piece.real]


def block_mask(
    ends: Tensor, depths: Tensor, blocks: Tensor | None, window: int | None
) -> BlockMask:
    """What FlexAttention needs, for (T,) tokens, T a multiple of ``BLOCK``.

    By what is known of blocks of tokens: nobody asks each pair of them.
    """

    def seen(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        found = (key <= query) & (query < ends[key])
        if window is not None:
            found = found & (depths[query] - depths[key] < window)
        if blocks is not None:
            found = found | ((blocks[query] == blocks[key]) & (blocks[query] >= 0))
        return found

    count = len(ends) // BLOCK
    starts = torch.arange(count, device=ends.device) * BLOCK
    tiles = ends.view(count, BLOCK)
    # A block of queries sees something of one of keys, or all of it.
    some = (starts[:, None] >= starts) & (starts[:, None] < tiles.amax(1))
    whole = (starts[:, None] > starts) & (starts[:, None] + BLOCK <= tiles.amin(1))
    if window is not None:
        near = depths.view(count, BLOCK)
        whole &= near.amax(1)[:, None] - near.amin(1) < window
    if blocks is not None:  # A picture's tokens stand together: in one block or its neighbours.
        far = (blocks >= 0).view(count, BLOCK).any(1)
        some |= far[:, None] & far
    partly = some & ~whole

    def listed(those: Tensor) -> tuple[Tensor, Tensor]:
        first = those.int().argsort(dim=1, descending=True, stable=True).int()
        return those.sum(1).int()[None, None], first[None, None]

    return BlockMask.from_kv_blocks(
        *listed(partly),
        *listed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=seen,
        seq_lengths=(len(ends), len(ends)),
    )
