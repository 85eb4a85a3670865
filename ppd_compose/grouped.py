"""Attention of a tree's rows in which no key is repeated for the queries that share it.

Knows transformers' attention modules and how to give a model others, in a structure beside the base's over the same
parameters. Does not know trees or caches.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .modes import beside

BORROWED = "ppd_compose_grouped"
OWN = "ppd_compose_grouped_rows"  # a single row too, which then is not rounded as the base rounds it
ELSEWHERE = ("position_bias", "softcap", "cache")  # what transformers' own function sees to


def group(model: Any) -> None:
    """Let the attention modules of `model`, which are its own, repeat no keys; for a single row neither."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        if _repeats_keys(module):
            module.config = _asking_for(OWN, module.config, configs)


def grouped(model: Any) -> Any:
    """`model`, whose modules belong to a base, with attention modules that repeat no keys.

    All that is not an attention module or around one is the same object, so that whatever is attached or switched
    there later is seen. Made anew it costs a millisecond or two. To be made after a forward that told hidden states, if
    any is to tell them: transformers sees to that at the first of a module, and what it leaves there is shared too.
    """
    return _beside(model, {}) or model


def _beside(module: Any, configs: dict[int, Any]) -> Any:
    """A copy of `module` when there is attention in it that repeats keys, else None; so for a child that is None."""
    if module is None:
        return None
    mine = _repeats_keys(module)
    inner = {} if mine else {name: _beside(child, configs) for name, child in module._modules.items()}
    if not mine and not any(inner.values()):
        return None
    if mine:
        return beside(module, config=_asking_for(BORROWED, module.config, configs))
    return beside(module, _modules={name: inner[name] or child for name, child in module._modules.items()})


def _repeats_keys(module: Any) -> bool:
    groups, config = getattr(module, "num_key_value_groups", 1), getattr(module, "config", None)
    return isinstance(groups, int) and groups > 1 and getattr(config, "_attn_implementation", None) == "sdpa"


def _asking_for(name: str, config: Any, made: dict[int, Any]) -> Any:
    """A copy of `config`, one for all modules that share it, by whose identity those `made` are known."""
    if id(config) not in made:
        made[id(config)] = copy.deepcopy(config)
        made[id(config)]._attn_implementation = name
    return made[id(config)]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    alone: bool,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers' sdpa; with a mask that all heads share, and where `alone` for one row that sees all, the queries
    of a key head stand below one another.

    Args:
        query: `[batch, heads, rows, head_dim]`.
        key: `[batch, key heads, columns, head_dim]`, as is `value`.
        attention_mask: bool or floats `[batch, 1, rows, columns]`.
    """
    shared = alone and query.shape[2] == 1 if attention_mask is None else attention_mask.shape[1] == 1
    if not shared or any(kwargs.get(k) is not None for k in ELSEWHERE):
        sdpa: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
        told: tuple[Tensor, None] = sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return told
    batch, heads, rows, dim = query.shape
    groups = heads // key.shape[1]
    below = query.reshape(batch, key.shape[1], groups * rows, dim)
    mask = None if attention_mask is None else attention_mask.repeat(1, 1, groups, 1)
    out = scaled_dot_product_attention(below, key, value, attn_mask=mask, scale=scaling)
    # Not every backend gives what can be viewed so: some lay rows before heads.
    return out.reshape(batch, heads, rows, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(BORROWED, partial(_attention, alone=False))
AttentionInterface.register(OWN, partial(_attention, alone=True))
