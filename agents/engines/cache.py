"""Where a model keeps what it has read, and for how long its conversations are remembered."""

# torch's and transformers' types are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ...core.models.layers import attends_only


def layers_for(model: Any, room: int) -> list[Any]:
    """A cache's layers with ``room`` for that many columns, or those that the model has of its own.

    Raises:
        ValueError: transformers keeps nothing for such layers.
    """
    try:
        own = DynamicCache(config=model.config).layers
    except KeyError as cause:
        raise ValueError(f"there is no cache for layers of {cause}") from cause
    return [RoomyLayer(room) for _ in own] if attends_only(model) else own


def check_used(layers: Sequence[Any]) -> None:
    """Raises: ValueError: nothing was kept in the layers, so the model keeps it elsewhere."""
    # Layers of a model's own may have nothing to keep, but not all of them.
    enough = all if isinstance(layers[0], RoomyLayer) else any
    if not enough(map(_filled, layers)):
        raise ValueError("it keeps what it has read elsewhere than in the cache it is given")


def _filled(layer: Any) -> bool:
    states: dict[int, bool] = getattr(layer, "is_conv_states_initialized", {})
    return getattr(layer, "is_initialized", False) or any(states.values())


class RoomyLayer(DynamicLayer):
    """A cache layer that writes into room reserved ahead, instead of copying itself every token."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._length = 0
        self.store: tuple[Tensor, Tensor] | None = None
        """Keys and values, (B, H, room, D) each."""
        self.shared: tuple[Tensor, Tensor] | None = None
        """Those of what all rows begin with, (1, H, T, D) each, if they stand by themselves."""

    def begin(self, keys: Tensor, values: Tensor) -> None:
        """Start with these columns, (B, H, T, D), already there."""
        self._append(keys, values)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self._append(key_states, value_states)

    def _append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.store is None:
            batch, heads, _, width = keys.shape
            self.dtype, self.device = keys.dtype, keys.device
            self.is_initialized = True
            self.store = (
                keys.new_empty(batch, heads, self._room, width),
                values.new_empty(batch, heads, self._room, values.shape[-1]),
            )
        end = self._length + keys.shape[2]
        for store, states in zip(self.store, (keys, values), strict=True):
            store[:, :, self._length : end] = states
        self._length = end
        return self._show(self.store)

    def get_seq_length(self) -> int:
        return self._length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        assert self.store is not None
        # A new store: whoever remembers the old one finds it as it was.
        keys, values = (store.index_select(0, beam_idx) for store in self.store)
        self.store = (keys, values)
        self._show(self.store)

    def _show(self, store: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        shown = (store[0][:, :, : self._length], store[1][:, :, : self._length])
        self.keys, self.values = shown
        return shown


Read: TypeAlias = tuple[tuple[int, ...], tuple[str, ...]]
"""Token ids, and the content hashes of the pictures that placeholders among them stand for."""


@dataclass(frozen=True)
class Place:
    """Where the keys and values of a conversation so far are."""

    stores: list[tuple[Tensor, Tensor]]
    """Per layer."""
    row: int
    offset: int
    """The column of its first token; of the first behind ``base`` if it has one."""
    length: int
    """In tokens, those of ``base`` included."""
    base: "Place | None" = None
    """Where its beginning is, if that stands by itself."""

    @property
    def behind(self) -> int:
        """How many of its tokens stand by themselves."""
        return self.base.length if self.base else 0


class PrefixCache:
    """Keys and values of conversations, so that the next turn reads only what is new.

    And those of what many conversations begin with, for all that are to come. Forgets its oldest
    batches once it holds more than ``limit`` bytes, even the last. Must be cleared whenever the
    model's weights change.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._places: dict[Read, Place] = {}
        self._batches: deque[list[tuple[Tensor, Tensor]]] = deque()
        self._lengths: Counter[int] = Counter()
        self._shared: dict[tuple[int, ...], Place] = {}
        self.last: tuple[int, ...] = ()
        """The ids of the last prompt that began a conversation."""

    def find(self, prompt: Read) -> Place | None:
        """The longest conversation that ``prompt`` goes on from."""
        ids, images = prompt
        for length in sorted(self._lengths, reverse=True):
            if length < len(ids):
                # How many of the pictures stand so early is for the remembered one to say.
                for count in range(len(images), -1, -1):
                    place = self._places.get((ids[:length], images[:count]))
                    if place is not None:
                        return place
        return None

    def keep(
        self,
        layers: Sequence[RoomyLayer],
        rows: Sequence[tuple[int, Read, int]],
        base: Place | None = None,
    ) -> None:
        """Remember ``(row, what was read, column of the first)`` of the layers' present stores."""
        stores = [layer.store for layer in layers if layer.store is not None]
        for row, read, offset in rows:
            if read not in self._places:
                self._lengths[len(read[0])] += 1
            self._places[read] = Place(stores, row, offset, len(read[0]), base)
        self._batches.append(stores)
        self._shrink()

    def shared(self, ids: tuple[int, ...]) -> Place | None:
        """Where exactly these are, for whoever begins with them."""
        return self._shared.get(ids)

    def share(self, ids: tuple[int, ...], place: Place) -> None:
        """Keep them until the weights change, as far as there is room."""
        self._shared[ids] = place
        self._shrink()

    def begins(self, ids: tuple[int, ...]) -> int:
        """How much of a prompt's beginning is kept, as far as there is more of it."""
        kept = (len(one) for one in self._shared if len(one) < len(ids) and one == ids[: len(one)])
        return max(kept, default=0)

    def _shrink(self) -> None:
        while self.nbytes > self._limit and (self._batches or self._shared):
            if self._batches:
                self._forget(self._batches.popleft())
            else:
                del self._shared[next(iter(self._shared))]

    @property
    def nbytes(self) -> int:
        shared = [place.stores for place in self._shared.values()]
        return sum(k.nbytes + v.nbytes for stores in (*self._batches, *shared) for k, v in stores)

    def _forget(self, batch: list[tuple[Tensor, Tensor]]) -> None:
        for read in [read for read, place in self._places.items() if place.stores is batch]:
            del self._places[read]
            self._lengths[len(read[0])] -= 1
        self._lengths = +self._lengths

    def clear(self, shared: bool = True) -> None:
        """Forget the conversations, and what they share if ``shared``."""
        self._places.clear()
        self._batches.clear()
        self._lengths.clear()
        if shared:
            self._shared.clear()
            self.last = ()


def copy_places(
    layers: Sequence[RoomyLayer], places: Sequence[Place], offsets: Sequence[int], width: int
) -> None:
    """Fill the first ``width`` columns of every row from where its conversation is remembered.

    ``offsets``: the column at which each row's prompt begins now.
    """
    batches: dict[int, list[int]] = {}
    for k, place in enumerate(places):
        batches.setdefault(id(place.stores), []).append(k)
    for number, layer in enumerate(layers):
        first = places[0].stores[number][0]
        columns = torch.arange(width, device=first.device)
        filled = [
            store.new_zeros(len(places), store.shape[1], width, store.shape[3])
            for store in places[0].stores[number]
        ]
        for members in batches.values():
            rows = torch.tensor([places[k].row for k in members], device=first.device)
            shift = torch.tensor([places[k].offset - offsets[k] for k in members])
            where = (columns + shift.to(first.device)[:, None]).clamp(min=0)
            for target, store in zip(filled, places[members[0]].stores[number], strict=True):
                taken = store[rows[:, None], :, where.clamp(max=store.shape[2] - 1)]  # (R, W, H, D)
                target[torch.tensor(members, device=first.device)] = taken.transpose(1, 2)
        layer.begin(*filled)
