"""A KV cache that a forward writes where its keys and values shall stay, instead of copying those of the whole context.

Knows which layers can be, and that there is room in them. Does not know trees or who sees what.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .written import Extent, InPlaceLayer, WindowLayer


@contextmanager
def in_place(cache: Cache) -> Iterator[None]:
    """Within, a forward writes into the memory of the layers; afterwards they are transformers' own again."""
    try:
        lay_in_place(cache)
        yield
    finally:
        layers: list[Any] = list(cache.layers)
        cache.layers = [layer.give_back() if isinstance(layer, InPlaceLayer) else layer for layer in layers]


def lay_in_place(cache: Cache) -> None:
    """Let forwards write into the memory of `cache` from now on, where its layers hold all tokens, or the last ones of
    a window."""
    layers: list[Any] = list(cache.layers)
    length = cache.get_seq_length()
    extents: dict[int | None, Extent] = {None: Extent(length)}
    cache.layers = [_laid(layer, length, extents) for layer in layers]
    laid = in_place_layers(cache)
    for each in {layer.extent for layer in laid}:
        each.everywhere = len(laid) == len(layers) and all(layer.extent is each for layer in laid)
    make_room(cache, 1)


def _laid(layer: Any, length: int, extents: dict[int | None, Extent]) -> Any:
    """What stands in for `layer`, which shares its extent with others of the same window; itself where it holds nothing
    or something else than the `length` tokens there are."""
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.get_seq_length() != length:
        return layer
    if type(layer) is DynamicLayer:
        return InPlaceLayer(layer, extents[None])
    window, held = layer.sliding_window, layer.keys.shape[-2]
    extent = Extent(held + 1, front=1, window=window, gone=length - held)
    return WindowLayer(layer, extents.setdefault(window, extent))


def make_room(cache: Cache, rows: int) -> None:
    """Let there be room for `rows` more, and for one that nobody fills."""
    # Their memory grows and slides from the first layer to the last.
    if everywhere(cache) and _has_room(cache.layers[-1], rows):
        return
    slid: dict[Extent, Extent] = {}
    for layer in in_place_layers(cache):
        extent = layer.extent
        if _has_room(layer, rows):
            continue
        if extent.stale:
            layer.slide(slid.setdefault(extent, extent.slid()), rows + 1)
        else:
            layer.grow(rows + 1)


def _has_room(layer: Any, rows: int) -> bool:
    return bool(layer.room >= layer.extent.columns + rows + 1)


def count(cache: Cache, rows: int) -> None:
    """Let `rows` rows more count, which a forward has written, or fewer."""
    for extent in _extents(cache):
        extent.columns += rows


def counted(cache: Cache) -> int:
    """How many columns count in the layers that are written in place; 0 where there are none."""
    return max((extent.columns for extent in _extents(cache)), default=0)


def tokens(cache: Cache) -> dict[int | None, int]:
    """By window, how many tokens the layers have seen that are written in place."""
    return {extent.window: extent.tokens for extent in _extents(cache)}


def count_again(cache: Cache, before: Mapping[int | None, int]) -> None:
    """Let as many count as `tokens` told before."""
    for extent in _extents(cache):
        extent.columns = before[extent.window] - extent.gone


def put_in_front(cache: Cache, prefixes: Sequence[Tensor]) -> None:
    """Put `prefixes`, each `[layers, 2, key heads, columns, head_dim]`, one behind the other before all that the layers
    hold that keep the whole context, written in place; a forward sees them like the context. Raises `ValueError` for
    one of other layers.
    """
    layers = [layer for layer in in_place_layers(cache) if layer.extent.window is None]
    for prefix in prefixes:
        wanted = {(len(layers), 2, layer.keys.shape[1], prefix.shape[3], layer.keys.shape[3]) for layer in layers}
        if wanted != {tuple(prefix.shape)}:
            raise ValueError(f"a prefix of {tuple(prefix.shape)} does not fit a KV cache that takes {sorted(wanted)}")
    whole = torch.cat(list(prefixes), dim=3)
    for layer, (keys, values) in zip(layers, whole, strict=True):
        layer.move_behind(keys, values)
    for extent in {layer.extent for layer in layers}:
        extent.front += whole.shape[3]
        extent.columns += whole.shape[3]


def hide(cache: Cache, front: bool, stale: bool) -> None:
    """Set what the next forwards see. `front`: the prefixes are hidden, in layers that keep the whole context. `stale`:
    columns that have left the window are, in layers with one."""
    for extent in _extents(cache):
        if extent.window is None:
            extent.hidden = extent.front if front else 0
        else:
            extent.hidden = extent.front + extent.stale if stale else 0


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
