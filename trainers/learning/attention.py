"""Attention in forests: each token sees those before it on its own way from the root.

Registered with transformers under ``NAME``, for models that do nothing but attend. On CUDA it is
FlexAttention, which leaves out blocks that nobody may see. Elsewhere it is torch's own attention, a
segment of a tree at a time: those without a branch behind them see all that is before them, so the
work is what the rows alone would need. Segments of about the same size are computed at once.
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
from torch.nn.functional import scaled_dot_product_attention
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
WASTE = 1.5
"""Segments are computed at once if that is no more than so many times their work."""


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
    for name in ("softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise LearnerError(f"its attention has a {name}, which is not known here")
    if isinstance(tree, dict):
        out: Tensor = COMPILED[0](
            query, key, value, block_mask=tree[sliding_window], scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (one.repeat_interleave(groups, 1) for one in (key, value))
    parts = tree.parts(sliding_window)
    found = [
        scaled_dot_product_attention(
            _at(query, part.queries),
            _at(key, part.keys),
            _at(value, part.keys),
            attn_mask=part.mask,
            is_causal=part.mask is None,
            dropout_p=dropout,
            scale=scaling,
        )
        for part in parts
    ]
    # (B, H, Q, D) each to (T, H, D), in the order of the parts, then in that of the tokens.
    flat = [
        one.transpose(1, 2).flatten(0, 1)[part.real]
        if part.real is not None
        else one.transpose(1, 2).flatten(0, 1)
        for one, part in zip(found, parts, strict=True)
    ]
    return torch.cat(flat)[tree.back][None], None


def _at(heads: Tensor, where: Tensor | slice) -> Tensor:
    """(B, H, Q, D) of the (B, Q) tokens ``where``, or (1, H, Q, D) of a stretch of them."""
    if isinstance(where, slice):
        return heads[:, :, where]
    return heads[0][:, where].transpose(0, 1)


@dataclass
class Part:
    """Segments that are computed at once."""

    queries: Tensor | slice
    """(B, Q) where they stand, padded with 0,"""
    keys: Tensor | slice
    """and (B, K) what is before them and themselves."""
    mask: Tensor | None
    """(B, 1, Q, K) bool; None: each sees those up to itself."""
    real: Tensor | None
    """Of (B * Q,), which are no padding; None: all."""
    tokens: Numbers
    """Where what is real stands."""


@dataclass
class Tree:
    """What attention needs to know of a forest, made once for all layers."""

    forest: Forest
    device: torch.device
    blocks: Numbers | None = None
    """(T,) a number for tokens that all see one another, as those of one picture do for some
    models; -1: none."""
    back: Tensor = field(init=False)
    """(T,) where each token stands among those of all parts."""
    _parts: dict[int | None, list[Part]] = field(default_factory=dict[int | None, list[Part]])

    def __post_init__(self) -> None:
        order = np.concatenate([part.tokens for part in self.parts(None)])
        self.back = torch.as_tensor(np.argsort(order), device=self.device)

    def parts(self, window: int | None) -> list[Part]:
        """``window``: a token sees no more than so many, itself among them."""
        if window not in self._parts:
            self._parts[window] = [self._part(group, window) for group in self._groups()]
        return self._parts[window]

    def _groups(self) -> list[list[int]]:
        """Segments in groups of about the same numbers of queries and keys."""
        segments = self.forest.segments
        sizes = [
            (one.end - one.begin, sum(segments[k].end - segments[k].begin for k in one.before))
            for one in segments
        ]
        groups: list[list[int]] = []
        work = most = 0
        for k in sorted(range(len(segments)), key=lambda k: (sizes[k][1] > 0, sizes[k])):
            mine, before = sizes[k]
            together = work + mine * (mine + before)
            widest = max(most, mine + before)
            rooted = groups and not sizes[groups[-1][0]][1]
            alike = groups and rooted == (before == 0)
            if alike and (len(groups[-1]) + 1) * mine * widest <= WASTE * together + 1024:
                groups[-1].append(k)
                work, most = together, widest
            else:
                groups.append([k])
                work, most = mine * (mine + before), mine + before
        return groups

    def _part(self, group: Sequence[int], window: int | None) -> Part:
        segments = self.forest.segments
        own = [np.arange(segments[k].begin, segments[k].end) for k in group]
        ways = [
            np.concatenate([np.arange(segments[j].begin, segments[j].end) for j in (*before, k)])
            for k in group
            for before in (segments[k].before,)
        ]
        rooted = not segments[group[0]].before
        longest = max(map(len, ways))
        usual = rooted and (window is None or longest <= window) and self.blocks is None
        tokens = np.concatenate(own)
        if len(group) == 1:
            begin, end = segments[group[0]].begin, segments[group[0]].end
            whole = slice(begin, end)
            if rooted:
                keys: Tensor | slice = whole
            else:
                keys = torch.as_tensor(ways[0][None], device=self.device)
            mask = None if usual else self._seen(own[0][None], ways[0][None], window)
            return Part(whole, keys, mask, None, tokens)
        queries, real = _padded(own)
        keys_at, there = _padded(ways)
        mask = None
        if not usual:
            mask = self._seen(queries, keys_at, window, there)
        where = torch.as_tensor(queries, device=self.device)
        what = where if rooted else torch.as_tensor(keys_at, device=self.device)
        kept = None if real.all() else torch.as_tensor(real.flatten(), device=self.device)
        return Part(where, what, mask, kept, tokens)

    def _seen(
        self, queries: Numbers, keys: Numbers, window: int | None, real: Any = None
    ) -> Tensor:
        """(B, 1, Q, K) which keys, on the ways of their queries, are seen."""
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
        return torch.as_tensor(seen[:, None], device=self.device)


def _padded(runs: Sequence[Numbers]) -> tuple[Numbers, Any]:
    """(B, longest) numbers, padded with 0, and which are no padding."""
    longest = max(map(len, runs))
    real = np.arange(longest)[None] < np.array([len(run) for run in runs])[:, None]
    found = np.zeros(real.shape, np.int64)
    found[real] = np.concatenate(runs)
    return found, real


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
