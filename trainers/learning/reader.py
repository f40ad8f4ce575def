"""A model's pass over rows of tokens: what its head is given where something is predicted."""

# torch and transformers are partly untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.errors import LearnerError
from ...core.models.layers import attends_only
from ...core.models.tokens import PAD
from ...core.models.vision import Eye
from ...core.types import Image
from .attention import BLOCK, Tree, attend, block_mask, forgo
from .forest import Forest, Numbers, groves, plant
from .head import Barred, Head
from .pack import Row, Span, micro_batches

WORTH = 0.9
"""Rows stand in a forest, where padding would do, if that takes no more than so much of it."""
BRANCH = 16
"""A branch takes as long as so many tokens, with a small model on a CPU."""


def _cost(forest: Forest) -> int:
    """In tokens, about."""
    return len(forest) + BRANCH * forest.branches


def moved(values: Any, device: torch.device) -> Tensor:
    """A tensor there. Nobody waits for a GPU to take it."""
    found = torch.as_tensor(values)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found


def joined(arrays: Sequence[Numbers]) -> Numbers:
    """One after another."""
    return np.concatenate(arrays) if arrays else np.empty(0, np.int64)


@dataclass(frozen=True)
class Layout:
    """How rows stand before a model."""

    ids: Tensor
    """(B, T)."""
    at: tuple[Tensor, Tensor]
    """(N,), (N,): the row and column of what predicts each trained token."""
    targets: Tensor
    """(N,) the trained tokens, of the rows as they were given, one after another."""
    images: list[list[Image]]
    """Those whose tokens stand in each of the B."""
    rows: Sequence[Row]
    forest: Forest | None
    """None: (B, T) are the rows themselves, padded on the right."""


@dataclass
class Reader:
    """A model, with its adapter if it has one."""

    model: Any
    weights: Any
    """The language model itself."""
    device: torch.device
    budget: int
    """Tokens per micro-batch."""
    precision: str
    eye: Eye | None = None
    """What looks at pictures, if it sees."""
    eye_learns: bool = False
    narrow: bool = False
    """Whether the last layer may be spared what nobody reads: not where layers are compiled, or run
    again for their gradients."""
    head: Head = field(init=False)
    layers: Any = field(init=False)

    def __post_init__(self) -> None:
        self.head = Head(self.weights)
        self.layers = getattr(self.weights.get_decoder(), "layers", None) or ()

    @property
    def sizes(self) -> Any:
        """The model's config, where its widths stand."""
        return self.weights.config.get_text_config()

    @cached_property
    def plants(self) -> bool:
        """Whether it can read forests; tried once."""
        if not attends_only(self.weights) or self._attention() != "sdpa":
            return False
        usual = self.usual()
        some = [usual[:5], [*usual[:2], usual[5], usual[4]], usual[:0:-3]]
        rows = [Row(ids, spans=[Span(1, len(ids), 0.0, (), -1)]) for ids in some]
        mode = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                alone = [self._states(self._layout([row], None), {}) for row in rows]
                attend(self.weights)
                layout = self._layout(rows, plant(self._keys(rows), 1))
                together = self._states(layout, self._trees(layout))
        except (LearnerError, RuntimeError, TypeError, ValueError, AssertionError):
            forgo(self.weights)
            return False
        finally:
            self.model.train(mode)
        if self._near(together, torch.cat(alone)):
            return True
        forgo(self.weights)
        return False

    @cached_property
    def scale(self) -> float:
        """What the model multiplies its logits by, beside what ``Head`` knows of; tried once.

        Raises:
            LearnerError: it does something else to them.
        """
        ids = self.usual()
        layout = self._layout([Row(ids, spans=[Span(1, len(ids), 0.0, (), -1)])], None)
        mode = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.mixed():
                mine = self.head.logits(self._states(layout, {}))
                theirs = self.model(input_ids=layout.ids, use_cache=False).logits[0, :-1].float()
        finally:
            self.model.train(mode)
        by = 1.0 if self._near(mine, theirs) else float((mine * theirs).sum() / mine.square().sum())
        if not self._near(mine * by, theirs):
            raise LearnerError(
                f"{type(self.weights).__name__} does something to its logits that is not known "
                "here, so that it cannot be learned by learner.use: plain"
            )
        return by

    def usual(self) -> list[int]:
        """Some ids that stand for no picture."""
        picture = self.eye.vision.placeholder if self.eye else None
        return [k for k in range(min(12, self.sizes.vocab_size)) if k != picture][1:9]

    def _near(self, one: Tensor, other: Tensor) -> bool:
        near = 1e-3 if self.precision == "float32" else 5e-2
        return float((one - other).abs().max()) <= near * float(other.abs().max())

    def _attention(self) -> str:
        return self.weights.config.get_text_config(decoder=True)._attn_implementation

    def groups(self, rows: Sequence[Row], trained: int | None = None) -> list[list[int]]:
        """Indices of ``rows`` in groups that are computed at once.

        ``trained``: the most tokens of a group that are trained, if there is a limit.
        """
        padded = micro_batches(rows, self.budget, trained)
        if trained is not None or not self.plants:
            return padded
        keys = self._keys(rows)
        found = groves(keys, self.budget)
        cost = sum(_cost(plant([keys[k] for k in group])) for group in found)
        most = sum(max(len(rows[k].ids) for k in group) * len(group) for group in padded)
        return found if self._pays(cost, most) else padded

    def _pays(self, cost: int, padded: int) -> bool:
        return self.device.type == "cuda" or cost <= WORTH * padded

    def layout(self, rows: Sequence[Row]) -> Layout:
        """How ``rows`` are best computed. Raises: LearnerError: as ``scale``."""
        self.head.scale = self.scale
        # Asked by every process, whether it has rows or not: where the model is sharded, trying it
        # takes all of them.
        plants = self.plants
        if not rows or not plants:
            return self._layout(rows, None)
        forest = plant(self._keys(rows))
        padded = max(len(row.ids) for row in rows) * len(rows)
        return self._layout(rows, forest if self._pays(_cost(forest), padded) else None)

    def _layout(self, rows: Sequence[Row], forest: Forest | None) -> Layout:
        # By arrays throughout: long lists of pairs would keep the garbage collector busy.
        spans = [(k, span) for k, row in enumerate(rows) for span in row.spans]
        sizes = [span.end - span.begin for _, span in spans]
        owners = np.repeat(np.array([k for k, _ in spans], np.int64), sizes)
        spots = joined([np.arange(span.begin, span.end) for _, span in spans])
        whole = [np.array(row.ids) for row in rows]
        if forest is None:
            longest = max(map(len, whole), default=1)
            ids = np.full((max(len(rows), 1), longest), PAD)
            for k, row in enumerate(whole):
                ids[k, : len(row)] = row
            at = owners, spots - 1
            images = [[*row.images] for row in rows]
            targets = ids[owners, spots]
        else:
            ids = np.full((1, self._room(len(forest))), PAD)
            for row, places in zip(whole, forest.places, strict=True):
                ids[0, places] = row
            offsets = np.cumsum([0, *map(len, whole)])[:-1]
            places = joined(forest.places)
            at = owners * 0, places[offsets[owners] + spots - 1]
            images = [self._new(rows, forest)]
            targets = joined(whole)[offsets[owners] + spots]
        device = self.device
        where = (moved(at[0], device), moved(at[1], device))
        return Layout(moved(ids, device), where, moved(targets, device), images, rows, forest)

    def _room(self, size: int) -> int:
        return -(-size // BLOCK) * BLOCK if self.device.type == "cuda" else size

    def _keys(self, rows: Sequence[Row]) -> list[Numbers]:
        """What tells their tokens apart: ids, and whose they are where they stand for pictures."""
        keys = [np.array(row.ids) for row in rows]
        if self.eye is not None:
            names: dict[str, int] = {}
            for key, row in zip(keys, rows, strict=True):
                marks = self.eye.owners(row.ids, row.images)
                of = [names.setdefault(image.sha256, len(names)) for image in row.images]
                shown = marks >= 0
                key[shown] = -1 - np.array(of, np.int64)[marks[shown]]
        return keys

    def _new(self, rows: Sequence[Row], forest: Forest) -> list[Image]:
        """The pictures of the forest's tokens, in their order."""
        found: list[Image] = []
        for k, known in zip(forest.order, forest.known, strict=True):
            if self.eye is not None and rows[k].images:
                marks = self.eye.owners(rows[k].ids, rows[k].images)[:known]
                found += rows[k].images[int(marks.max(initial=-1)) + 1 :]
        return found

    def states(self, layout: Layout) -> Tensor:
        """(N, D) what the head is given to predict the trained tokens."""
        given: dict[str, Any] = {}
        if self.eye is not None and any(layout.images):
            with torch.set_grad_enabled(self.eye_learns and torch.is_grad_enabled()):
                given = self._seen(layout, self.eye)
        if layout.forest is not None:
            given = {**self._trees(layout), **given}
        return self._states(layout, given)

    def logprobs(self, states: Tensor, targets: Tensor, barred: Barred | None = None) -> Tensor:
        """(N,) nats, of what ``states`` predict."""
        with self.mixed():
            return self.head.logprobs(states, targets, barred)

    def logits(self, states: Tensor) -> Tensor:
        """(N, V) float32."""
        with self.mixed():
            return self.head.logits(states)

    def _seen(self, layout: Layout, eye: Eye) -> dict[str, Any]:
        """What a pass is given for pictures."""
        if layout.forest is None:
            lengths = torch.tensor([len(row.ids) for row in layout.rows], device=self.device)
            real = torch.arange(layout.ids.shape[1], device=self.device)[None] < lengths[:, None]
            return eye.given(layout.ids, layout.images, real)
        found = eye.arguments(layout.ids, layout.images)
        if eye.winds:
            rows = layout.rows
            longest = max(len(row.ids) for row in rows)
            whole = [row.ids + [PAD] * (longest - len(row.ids)) for row in rows]
            real = [[at < len(row.ids) for at in range(longest)] for row in rows]
            ids, there = (torch.tensor(one, device=self.device) for one in (whole, real))
            positions = eye.positions(ids, there, [row.images for row in rows])
            owners, depths = layout.forest.owners, layout.forest.depths
            flat = positions[:, owners, depths]
            room = layout.ids.shape[1] - flat.shape[1]
            found["position_ids"] = torch.nn.functional.pad(flat, (0, room))[:, None]
        return found

    def _trees(self, layout: Layout) -> dict[str, Any]:
        """What a pass over a forest is given."""
        forest = layout.forest
        assert forest is not None
        blocks = None
        if self.eye is not None and self.eye.vision.marks_kinds and any(layout.images):
            blocks = self._blocks(layout.rows, forest)
        room = layout.ids.shape[1] - len(forest)
        depths = np.pad(forest.depths, (0, room))
        positions = moved(depths, self.device)
        # transformers makes no mask of all pairs of tokens where one is given; nobody looks at it.
        given = {"position_ids": positions[None], "attention_mask": positions.new_ones(1, 1, 1, 1)}
        if self.device.type != "cuda":
            return {**given, "tree": Tree(forest, self.device, blocks)}
        padding = np.arange(len(forest), len(forest) + room) + 1
        ends = moved(np.concatenate([forest.ends, padding]), self.device)
        of = None
        if blocks is not None:
            of = moved(np.pad(blocks, (0, room), constant_values=-1), self.device)
        windows = {None, getattr(self.sizes, "sliding_window", None)}
        trees = {window: block_mask(ends, positions, of, window) for window in windows}
        return {**given, "tree": trees}

    def _blocks(self, rows: Sequence[Row], forest: Forest) -> Numbers:
        """(T,) a number for each picture's tokens; -1: of none."""
        found = np.full(len(forest), -1)
        assert self.eye is not None
        most = max(len(row.images) for row in rows)
        for k in forest.order[::-1]:  # The first to have come names what it shares.
            marks = self.eye.owners(rows[k].ids, rows[k].images)
            found[forest.places[k]] = np.where(marks >= 0, marks + k * most, -1)
        return found

    def mixed(self) -> Any:
        """What is computed in bf16, if anything is."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"
        )

    def _states(self, layout: Layout, given: dict[str, Any]) -> Tensor:
        with self.reading(layout) as read:
            self.model(input_ids=layout.ids, use_cache=False, **given)
        return read[0]

    @contextmanager
    def reading(self, layout: Layout) -> Generator[list[Tensor]]:
        """Of a pass: what the head is given where it predicts, put into a list.

        The head itself then sees a single position. The last layer's MLP sees these positions
        alone, if it may, as (1, N, D): nobody reads what it makes of others.
        """
        rows, at = layout.at
        width = layout.ids.shape[1]

        def take(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            read.append(args[0][rows, at])
            return (args[0][:1, :1],)

        def select(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            shape.append(args[0].shape)
            return (args[0][one, those][None],)

        def put_back(_: Any, __: Any, output: Tensor) -> Tensor:
            return output.new_zeros(shape.pop()).index_put((one, those), output[0])

        read: list[Tensor] = []
        shape: list[torch.Size] = []
        one: Any = at
        those: Any = at
        hooks = [self.weights.get_output_embeddings().register_forward_pre_hook(take)]
        last = getattr(self.layers[-1], "mlp", None) if self.layers and self.narrow else None
        if last is not None and not hasattr(last, "experts"):  # Those want whole sequences.
            # A token may predict several that follow it on different ways.
            once: Any = (rows * width + at).unique()
            one, those = once // width, once % width
            hooks.append(last.register_forward_pre_hook(select))
            hooks.append(last.register_forward_hook(put_back))
        try:
            with self.mixed():
                yield read
        finally:
            for hook in hooks:
                hook.remove()
