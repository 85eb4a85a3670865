"""Keeping the accepted path of a forward in a transformers KV cache, and dropping the other rows.

Knows cache layers. Works on their `keys` and `values`, never with `crop(n)`, whose meaning changed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .fixed import memory_of
from .inplace import count, count_again, counted, everywhere, in_place, tokens
from .written import InPlaceLayer

TREE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
NAME, OLD_NAME = "cache", "past_key_values"  # of the KV cache, from transformers 5.24 on and before
ROUTERS = "output_router_logits"
GENERATE_NAME = NAME if NAME in inspect.signature(GenerateDecoderOnlyOutput).parameters else OLD_NAME


def cache_name(model: object) -> str:
    """The keyword by which the forward of `model` takes the KV cache: code beside a checkpoint may keep the old one."""
    return _cache_name(type(model).forward)  # type: ignore[attr-defined]


@functools.cache
def _cache_name(forward: Callable[..., Any]) -> str:
    return NAME if NAME in inspect.signature(forward).parameters else OLD_NAME


def with_cache(model: Any, cache: Cache) -> dict[str, Any]:
    """Keyword arguments of a forward of `model` that reads `cache` and adds to it, and of experts tells nothing: what
    they did is a part of losses, which are computed from masks of tokens, not of candidate trees."""
    quiet = {ROUTERS: False} if getattr(model.config, ROUTERS, False) else {}
    return {cache_name(model): cache, "use_cache": True, **quiet}


def refuse_cache(cache: object, model: PreTrainedModel) -> None:
    """Raise `ValueError` unless every layer of `cache` can lose rows from its middle, and has the window that it has in
    `model`."""
    advice = f"leave cache_implementation and {GENERATE_NAME} unset, or pass a DynamicCache(config=model.config)"
    keeps = "where they are unset it is the model that keeps such a state, and no composition is possible"
    if not isinstance(cache, Cache):
        raise ValueError(f"a tree needs a KV cache, got {type(cache).__name__}: {advice}")
    for layer in cache.layers:
        if type(layer) not in TREE_LAYERS:
            raise ValueError(f"{type(layer).__name__} cannot take a candidate tree: {advice}; {keeps}")
    if getattr(cache, "offloading", False):
        raise ValueError(f"an offloaded KV cache cannot take a candidate tree: {advice}")
    held = [int(layer.get_seq_length()) for layer in _filled(cache)]
    if any(length != cache.get_seq_length() for length in held):
        raise ValueError(
            f"the layers of the KV cache hold different numbers of tokens ({sorted(set(held))}), of an image, "
            f"say: it cannot take a candidate tree; leave {GENERATE_NAME} unset, and images out"
        )
    windows = _windows(DynamicCache(config=model.config))
    if isinstance(cache, DynamicCache) and not cache.layers and any(window is not None for window in windows):
        raise ValueError(f"a DynamicCache without layers does not say how wide its windows are: {advice}")
    if _windows(cache) != windows[: len(cache.layers)]:
        raise ValueError(f"the KV cache has other windows than {type(model).__name__}: {advice}")


def refuse_forgetful(model: Any, cache: Cache, tokens: int) -> None:
    """Raise `ValueError` where forwards of `model` should have left `tokens` in `cache`, and have not."""
    if all(layer.get_seq_length() != tokens for layer in _filled(cache)):
        raise ValueError(
            f"{type(model).__name__} wrote nothing into its KV cache, as some do while they are trained with gradient "
            "checkpointing: call its eval() before, or use the base model's own generate"
        )


def _windows(cache: Cache) -> list[int | None]:
    """By layer, how many tokens it attends to; None: all."""
    layers: list[Any] = list(cache.layers)
    return [layer.sliding_window if getattr(layer, "is_sliding", False) else None for layer in layers]


@contextmanager
def recording(cache: Cache) -> Iterator[None]:
    """Let sliding layers keep rows that have left their window until `commit` says which rows stay, and other layers be
    written in place."""
    layers: list[Any] = list(cache.layers)
    sliding = [layer for layer in layers if layer.is_sliding]
    for layer in sliding:
        layer.activate_past_recording()
    try:
        with in_place(cache):
            yield
    finally:
        for layer in sliding:
            layer.record_past = False


@contextmanager
def undone(cache: Cache) -> Iterator[None]:
    """Where what is within breaks off, a forward or the commit after it, `cache` holds again what it held before. What
    they write in place stands behind that."""
    layers, told = _added_to(cache), tokens(cache)
    before = [dict(vars(layer)) for layer in layers]
    try:
        yield
    except BaseException:
        for layer, held in zip(layers, before, strict=True):
            vars(layer).update(held)
        count_again(cache, told)
        raise


def commit(cache: Cache, rows: int, path: Sequence[int]) -> None:
    """Of the last `rows` rows keep those in `path`, in that order.

    A layer's tensors were made by the forward that has just run, or are its own, so they are written in place: rows
    move up, and what remains counts.
    """
    moved = [(to, row) for to, row in enumerate(path) if to != row]
    dropped = rows - len(path)
    for states, held in _written(cache) if moved else ():
        _move(states, held - rows, moved)
    count(cache, -dropped)
    for layer in _added_to(cache):
        layer.keys, layer.values = _less(layer.keys, dropped), _less(layer.values, dropped)
        if layer.is_sliding:
            layer.cumulative_length -= dropped
            layer.crop(0)


def whole_context(cache: Cache) -> list[Any]:
    """The layers that hold something, and all of the context."""
    return [layer for layer in _filled(cache) if not layer.is_sliding]


def leave_a_gap(cache: Cache) -> None:
    """Let keys and values be views of a tensor with room for one token more, as after a commit that drops a row."""
    for layer in _added_to(cache):
        layer.keys, layer.values = _with_room(layer.keys), _with_room(layer.values)


def _added_to(cache: Cache) -> list[Any]:
    """The layers to whose keys and values a forward adds, by making new ones."""
    layers: list[Any] = [] if everywhere(cache) else cache.layers
    return [layer for layer in layers if not isinstance(layer, InPlaceLayer) and layer.is_initialized]


def _filled(cache: Cache) -> list[Any]:
    """The layers that hold something: a model that takes images may pass by those that look at them."""
    layers: list[Any] = cache.layers
    return [layer for layer in layers if layer.is_initialized]


def _with_room(states: Tensor) -> Tensor:
    length = states.shape[-2]
    return pad(states, (0, 0, 0, 1)).narrow(-2, 0, length)


def _written(cache: Cache) -> Iterator[tuple[Tensor, int]]:
    """Keys and values, those of all layers at once where they lie in one memory, and how many columns hold
    something."""
    if (memory := memory_of(cache)) is not None:
        yield from ((stack, counted(cache)) for stack in memory.stacks.values())
        return
    for layer in _filled(cache):
        if isinstance(layer, InPlaceLayer):
            yield from ((states, layer.extent.columns) for states in layer.tensors)
        else:
            yield from ((states, states.shape[-2]) for states in (layer.keys, layer.values))


def _move(states: Tensor, begin: int, moved: Sequence[tuple[int, int]]) -> None:
    for to, row in moved:  # a path ascends, so a row is read before it is written over
        states.select(-2, begin + to).copy_(states.select(-2, begin + row))


def _less(states: Tensor, dropped: int) -> Tensor:
    return states.narrow(-2, 0, states.shape[-2] - dropped)
