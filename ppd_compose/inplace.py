"""Keys and values that a forward writes where they shall stay, instead of copying those of the whole context.

Knows memory and how much of it counts. Does not know trees.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache
from transformers.cache_utils import DynamicLayer

ROOM = 256  # tokens by which the memory grows


@dataclass
class Extent:
    """How many tokens the layers of a cache hold; what stands behind them is written over."""

    tokens: int


class InPlaceLayer(DynamicLayer):
    """Stands in for a layer of transformers: `keys` and `values`, `[batch, heads, room, head_dim]`, are longer than
    what they hold, so that a forward's own fit in behind."""

    def __init__(self, layer: Any, extent: Extent) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer, self.extent = layer, extent
        self.keys, self.values, self.is_initialized = layer.keys, layer.values, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write them behind what counts, for which `make_room` has been called; all there is then, `[..., columns, _]`.

        They count when `count` is told: a compiled forward changes tensors and nothing else.
        """
        keys: Any = self.keys
        values: Any = self.values
        begin = self.extent.tokens
        end = begin + key_states.shape[-2]
        keys[:, :, begin:end] = key_states
        values[:, :, begin:end] = value_states
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self) -> int:
        """Tokens that count."""
        return self.extent.tokens

    def give_back(self) -> Any:
        """The layer that this one stands in for, with what counts."""
        held: list[Any] = [self.keys, self.values]
        self.layer.keys, self.layer.values = (states.narrow(-2, 0, self.extent.tokens) for states in held)
        return self.layer


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
        if type(layer) is DynamicLayer and layer.get_seq_length() == extent.tokens
        else layer
        for layer in layers
    ]
    make_room(cache, 1)


def make_room(cache: Cache, rows: int) -> None:
    """Let there be room for `rows` more, and for one that nobody fills."""
    for layer in in_place_layers(cache):
        room, needed = layer.keys.shape[-2], layer.extent.tokens + rows + 1
        if room < needed:
            more = ROOM * -(-needed // ROOM) - room
            # What the layer stood in for holds the same, so that the old memory is free.
            layer.keys = layer.layer.keys = pad(layer.keys, (0, 0, 0, more))
            layer.values = layer.layer.values = pad(layer.values, (0, 0, 0, more))


def count(cache: Cache, rows: int) -> None:
    """Let `rows` rows more count, which a forward has written, or fewer."""
    for extent in {id(layer.extent): layer.extent for layer in in_place_layers(cache)}.values():
        extent.tokens += rows


def in_place_layers(cache: Cache) -> list[Any]:
    """Layers whose memory is written into."""
    layers: list[Any] = list(cache.layers)
    return [layer for layer in layers if isinstance(layer, InPlaceLayer)]
