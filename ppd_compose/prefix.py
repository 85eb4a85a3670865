"""Prefixes: keys and values before a sequence, seen by nobody but the rows that their drafter appends.

Knows their shape, how they are rounded for files, and which model they fit. Does not know decoding or training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .cache import whole_context, with_cache
from .check import HUGE, MalformedDraft, is_huge
from .identity import LARGEST
from .modes import evaluating

MOST = 256  # columns
EIGHT_BITS = torch.float8_e4m3fn  # of a prefix in a file, where its numbers are such


def check_prefix_shape(shape: Sequence[int]) -> None:
    """Raise `ValueError` unless `shape` is that of a prefix."""
    whole = isinstance(shape, list | tuple) and all(type(size) is int and size >= 1 for size in shape)
    if not whole or len(shape) != 5 or shape[1] != 2 or shape[3] > MOST or math.prod(shape) > LARGEST:
        raise ValueError(
            f"a prefix must be [layers, 2, key heads, columns, head_dim], none of them 0 and at most {MOST} columns, "
            f"got {shape!r:.60}"
        )


def as_prefix(given: object) -> Tensor:
    """`given`, when it can be a prefix; in bfloat16 where it is of eight bits. Else a `ValueError`."""
    if not isinstance(given, Tensor) or not given.is_floating_point():
        raise ValueError(f"a prefix must be a Tensor of floats, got {given!r:.60}")
    check_prefix_shape(tuple(given.shape))
    prefix = given.detach().bfloat16() if given.dtype == EIGHT_BITS else given.detach()
    refuse_huge(prefix, "a prefix holds")
    return prefix


def refuse_huge(states: Tensor, what: str) -> None:
    """Raise `ValueError` for NaN or values beyond `HUGE`: a forward may make NaN of them, which spreads even to rows
    that the mask hides them from."""
    if is_huge(states):
        raise ValueError(f"{what} NaN or values beyond {HUGE:g}: the file is damaged or training diverged")


def check_prefix(prefix: object, drafter: str) -> Tensor:
    """`prefix`, or `MalformedDraft` naming `drafter` and the fault."""
    try:
        return as_prefix(prefix)
    except ValueError as fault:
        raise MalformedDraft(f"drafter {drafter!r}", str(fault)) from None


def in_eight_bits(prefix: Tensor) -> Tensor:
    """The nearest numbers that a file holds in eight bits each, in the dtype of `prefix`."""
    most = torch.finfo(EIGHT_BITS).max
    return prefix.clamp(-most, most).to(EIGHT_BITS).to(prefix.dtype)


@torch.no_grad()
def prefix_shape(model: Any, columns: int) -> tuple[int, int, int, int, int]:
    """What a prefix of `columns` columns has to be for `model`: as its keys and values are after one token.

    Raises `ValueError` for a model without layers that keep the whole context, or with such that differ in heads or
    sizes.
    """
    cache = DynamicCache(config=model.config)
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with evaluating(model):
        model(input_ids=ids, **with_cache(model, cache))
    layers = whole_context(cache)
    shapes = {(states.shape[1], states.shape[3]) for layer in layers for states in (layer.keys, layer.values)}
    if len(shapes) != 1:
        raise ValueError(
            f"{type(model).__name__} takes no prefix: {len(layers)} of its layers keep the whole context, with heads "
            f"and sizes {sorted(shapes)}, and they must be some, all alike; train prompt tokens with prefix=0 "
            "(--prefix 0)"
        )
    heads, size = shapes.pop()
    return len(layers), 2, heads, columns, size


def refuse_prefix(prefix: Tensor, model: Any) -> None:
    """Raise `ValueError` for a prefix that was made for another model."""
    wanted = prefix_shape(model, prefix.shape[3])
    if tuple(prefix.shape) != wanted:
        raise ValueError(
            f"this prefix was made for another base: it is {tuple(prefix.shape)}, {type(model).__name__} takes {wanted}"
        )
