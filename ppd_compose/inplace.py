"""Keys and values that a forward writes where they shall stay, instead of copying those of the whole context.

Knows memory, how much of it counts, and columns in front of the context. Does not know trees or who sees what.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

ROOM = 128  # tokens by which the memory grows


@dataclass(eq=False)
class Extent:
    """How many columns the layers of a cache hold; what stands behind them is written over."""

    columns: int
    front: int = 0  # of them, before those of the context
    hidden: int = 0  # of those in front, kept from the next forward
    everywhere: bool = False  # whether all layers of the cache have this one


class InPlaceLayer(DynamicLayer):
    """Stands in for a layer of transformers: `keys` and `values`, `[batch, heads, room, head_dim]`, are longer than
    what they hold, so that a forward's own fit in behind."""

    def __init__(self, layer: Any, extent: Extent) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer, self.extent = layer, extent
        self.keys, self.values, self.is_initialized = layer.keys, layer.values, True
        self.front = 0  # columns of its memory before those of the context

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write them behind what counts, for which `make_room` has been called; all there is then but what is hidden,
        `[..., columns, _]`.

        They count when `count` is told: a compiled forward changes tensors and nothing else.
        """
        keys: Any = self.keys
        values: Any = self.values
        begin, hidden = self.extent.columns, self.extent.hidden
        end = begin + key_states.shape[-2]
        keys[:, :, begin:end] = key_states
        values[:, :, begin:end] = value_states
        return keys[:, :, hidden:end], values[:, :, hidden:end]

    def get_seq_length(self) -> int:
        """Columns that a forward sees before its own."""
        return self.extent.columns - self.extent.hidden

    def give_back(self) -> Any:
        """The layer that this one stands in for, with what counts of the context."""
        held: list[Any] = [self.keys, self.values]
        tokens = self.extent.columns - self.extent.front
        self.layer.keys, self.layer.values = (states.narrow(-2, self.front, tokens) for states in held)
        return self.layer

    def move_behind(self, keys: Tensor, values: Tensor) -> None:
        """Let `keys` and `values` `[heads, columns, head_dim]` stand before the context."""
        held: Any = {"keys": self.keys, "values": self.values}
        front = {"keys": keys, "values": values}
        states = {name: torch.cat([front[name][None].to(old), old], dim=-2) for name, old in held.items()}
        vars(self).update(states, front=self.front + keys.shape[-2])  # at once: a call may be broken off anywhere
        vars(self.layer).update(states)  # so that the old memory is free


@contextmanager
def in_place(cache: Cache) -> Iterator[None]:
    """Within, a forward writes into the memory of all layers that keep the whole context; afterwards they are
    transformers' own again."""
    try:
        lay_in_place(cache)
        yield
    finally:
        layers: list[Any] = list(cache.layers)
        cache.layers = [layer.give_back() if isinstance(layer, InPlaceLayer) else layer for layer in layers]


def lay_in_place(cache: Cache) -> None:
    """Let forwards write into the memory of `cache` from now on, where its layers keep the whole context."""
    layers: list[Any] = list(cache.layers)
    extent = Extent(cache.get_seq_length())
    cache.layers = [
        InPlaceLayer(layer, extent)
        if type(layer) is DynamicLayer and layer.get_seq_length() == extent.columns
        else layer
        for layer in layers
    ]
    laid = in_place_layers(cache)
    for each in {layer.extent for layer in laid}:
        each.everywhere = len(laid) == len(layers) and all(layer.extent is each for layer in laid)
    make_room(cache, 1)


def make_room(cache: Cache, rows: int) -> None:
    """Let there be room for `rows` more, and for one that nobody fills."""
    for layer in in_place_layers(cache):
        room, needed = layer.keys.shape[-2], layer.extent.columns + rows + 1
        if room < needed:
            more = ROOM * -(-needed // ROOM) - room
            # What the layer stood in for holds the same, so that the old memory is free.
            layer.keys = layer.layer.keys = _longer(layer.keys, more)
            layer.values = layer.layer.values = _longer(layer.values, more)


def _longer(states: Tensor, more: int) -> Tensor:
    """`states` with room for `more` columns behind, which nobody has touched yet, so that they take no memory."""
    *outer, columns, size = states.shape
    longer = states.new_empty(*outer, columns + more, size)
    longer[..., :columns, :] = states
    return longer


def count(cache: Cache, rows: int) -> None:
    """Let `rows` rows more count, which a forward has written, or fewer."""
    for extent in _extents(cache):
        extent.columns += rows


def counted(cache: Cache) -> int:
    """How many columns count in the layers that are written in place; 0 where there are none."""
    return max((extent.columns for extent in _extents(cache)), default=0)


def put_in_front(cache: Cache, prefixes: Sequence[Tensor]) -> None:
    """Put `prefixes`, each `[layers, 2, key heads, columns, head_dim]`, one behind the other before all that the layers
    hold that are written in place; a forward sees them like the context. Raises `ValueError` for one of other layers.
    """
    layers = in_place_layers(cache)
    for prefix in prefixes:
        wanted = {(len(layers), 2, layer.keys.shape[1], prefix.shape[3], layer.keys.shape[3]) for layer in layers}
        if wanted != {tuple(prefix.shape)}:
            raise ValueError(f"a prefix of {tuple(prefix.shape)} does not fit a KV cache that takes {sorted(wanted)}")
    whole = torch.cat(list(prefixes), dim=3)
    for layer, (keys, values) in zip(layers, whole, strict=True):
        layer.move_behind(keys, values)
    for extent in _extents(cache):
        extent.front += whole.shape[3]
        extent.columns += whole.shape[3]


def hide_front(cache: Cache, hidden: bool) -> None:
    """Keep what stands in front of the context from the forwards that follow, or show it."""
    for extent in _extents(cache):
        extent.hidden = extent.front if hidden else 0


def everywhere(cache: Cache) -> Extent | None:
    """What all layers of `cache` hold, where all are written in place."""
    first = cache.layers[0] if cache.layers else None
    return first.extent if isinstance(first, InPlaceLayer) and first.extent.everywhere else None


def _extents(cache: Cache) -> list[Extent]:
    if (extent := everywhere(cache)) is not None:
        return [extent]
    return list({layer.extent for layer in in_place_layers(cache)})


def in_place_layers(cache: Cache) -> list[Any]:
    """Layers whose memory is written into."""
    layers: list[Any] = cache.layers
    return [layer for layer in layers if isinstance(layer, InPlaceLayer)]
