"""Keys and values of all layers in memory that stays where it is, for forwards that read and write at fixed addresses.

Knows where each layer's lie, and how many columns there is room for. Does not know who reads them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from .inplace import counted, in_place_layers
from .replayed import RecordingStore
from .written import Extent, InPlaceLayer, WindowLayer

FEWEST = 512  # columns that there is room for


class Memory:
    """Room for the keys and values of one sequence at a time, and what was recorded of forwards that use it.

    Args:
        store: keeps recordings of forwards over it.
    """

    def __init__(self, store: RecordingStore) -> None:
        self.store = store
        self.stacks: dict[tuple[int, int], Tensor] = {}  # by heads and size [tensors, 1, heads, columns, size]
        self.visible = torch.zeros(0, dtype=torch.bool)  # [columns], False for padding
        self.windows: list[int | None] = []  # that the layers have; here all lie whole, and masks cut them
        self.cache: Any = None  # whose layers these are at the time
        # Of the forward that is being computed: where its own go `[rows]`, and how many columns it sees.
        self.places, self.seen = torch.zeros(0, dtype=torch.long), 0

    @property
    def room(self) -> int:
        """Columns that there is room for. One more is never seen, so that what a forward sees has a gap behind."""
        return len(self.visible) - 1

    @property
    def columns(self) -> int:
        """How many count."""
        return counted(self.cache)

    def take_in(self, cache: Cache, visible: Tensor) -> None:
        """Copy what the layers of `cache` hold, all of them written in place, and let these layers be its own."""
        layers = in_place_layers(cache)
        extent = _extent(layers)
        self.windows = list({layer.extent.window: None for layer in layers})
        self._make(layers, extent.columns)
        for stack in self.stacks.values():
            stack.zero_()  # a hidden column counts nothing only where it holds a number
        self.visible.fill_(True)
        self.visible[extent.front :][: len(visible)] = visible.to(self.visible.device)
        mine = [FixedLayer(layer, self, extent) for layer in layers]
        for layer, (keys, values) in zip(mine, self._views(layers), strict=True):
            layer.keys, layer.values = keys, values
            layer.take_in()
        self.cache, cache.layers = cache, list(mine)
        for layer in mine:
            layer.let_go()

    def give_back(self, cache: Cache) -> None:
        """Let the layers of `cache` be those that they were, with copies of what they hold now."""
        layers: list[Any] = list(cache.layers)
        cache.layers = [layer.moved_out() if isinstance(layer, FixedLayer) else layer for layer in layers]

    def make_room(self, rows: int) -> None:
        """Let there be room for `rows` columns more than count, at other addresses where that takes more memory: then
        nothing that was recorded holds any longer."""
        layers: list[Any] = list(self.cache.layers)
        held = self.columns
        if held + rows <= self.room:
            return
        old, visible = self.stacks, self.visible
        self._make(layers, held + rows)
        for kind, stack in old.items():
            self.stacks[kind][..., :held, :] = stack[..., :held, :]
        self.visible[:held] = visible[:held]
        for layer, (keys, values) in zip(layers, self._views(layers), strict=True):
            layer.keys, layer.values = keys, values

    def _make(self, layers: Sequence[Any], columns: int) -> None:
        """Memory for `columns` columns of `layers`, where there is none yet."""
        like, counts = layers[0].keys, Counter(map(_kind, _states(layers)))
        there = {kind: len(stack) for kind, stack in self.stacks.items()}
        if counts == there and columns <= self.room and {like.dtype} == {s.dtype for s in self.stacks.values()}:
            return
        self.store.forget()  # before what they read is gone
        self.stacks = {}
        room = max(FEWEST, 1 << (columns - 1).bit_length()) + 1
        with torch.inference_mode(False):  # what was made within could not be written to without
            self.stacks = {
                (heads, size): like.new_zeros(count, 1, heads, room, size) for (heads, size), count in counts.items()
            }
            self.visible = torch.ones(room, dtype=torch.bool, device=like.device)

    def _views(self, layers: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each of `layers` in this memory."""
        free = {kind: iter(stack) for kind, stack in self.stacks.items()}
        return [(next(free[_kind(layer.keys)]), next(free[_kind(layer.values)])) for layer in layers]


class FixedLayer(InPlaceLayer):
    """Stands in for a layer that is written in place: its keys and values lie in a `Memory`.

    Args:
        extent: how many columns count there, in all layers alike.
    """

    def __init__(self, inner: InPlaceLayer, memory: Memory, extent: Extent) -> None:
        super().__init__(inner.layer, extent)
        self.inner, self.memory, self.front = inner, memory, inner.front

    def take_in(self) -> None:
        """Copy what the layer held that this one stands in for, of a window what is left of it."""
        begin, end = self.inner.extent.front if self._slides else 0, self.inner.extent.columns
        for name in ("keys", "values"):
            theirs, mine = getattr(self.inner, name), getattr(self, name)
            mine[..., self.extent.columns - (end - begin) : self.extent.columns, :] = theirs[..., begin:end, :]

    def let_go(self) -> None:
        """Let the layer that this one stands in for, and transformers' own, hold what lies here, so that their memory
        is free; that of a window is small, and counted otherwise."""
        if self._slides:
            return
        self.inner.both = None
        for layer in (self.inner, self.layer):
            layer.keys, layer.values = self.keys, self.values

    def moved_out(self) -> InPlaceLayer:
        """The layer that this one stands in for, with a copy of what counts."""
        held: Any = {"keys": self.keys, "values": self.values}
        counts = {name: states[..., : self.extent.columns, :] for name, states in held.items()}
        self.inner.refill(counts, self.extent.front)
        return self.inner

    @property
    def _slides(self) -> bool:
        return isinstance(self.inner, WindowLayer)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write them where the memory says; of all that it holds as many columns as it says."""
        keys: Any = self.keys
        values: Any = self.values
        keys.index_copy_(2, self.memory.places, key_states)
        values.index_copy_(2, self.memory.places, value_states)
        return keys[:, :, : self.memory.seen], values[:, :, : self.memory.seen]


def _extent(layers: Sequence[Any]) -> Extent:
    """How many columns count of `layers` where those of windows hold all that the others do."""
    whole: Extent | None = next((layer.extent for layer in layers if layer.extent.window is None), None)
    return whole or Extent(layers[0].get_seq_length())


def memory_of(cache: Cache) -> Memory | None:
    """The memory in which the layers of `cache` lie; None where each has its own."""
    first = cache.layers[0] if cache.layers else None
    return first.memory if isinstance(first, FixedLayer) else None


def _states(layers: Sequence[Any]) -> list[Tensor]:
    return [states for layer in layers for states in (layer.keys, layer.values)]


def _kind(states: Tensor) -> tuple[int, int]:
    return states.shape[1], states.shape[3]
