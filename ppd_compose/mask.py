"""Attention masks in the form that a model's attention implementation takes.

Knows what sdpa and eager want, and windows. Does not know trees: it is told who sees whom.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel

IMPLEMENTATIONS = ("sdpa", "eager")


def attention_mask(model: PreTrainedModel, see: Tensor) -> Tensor:
    """Turn `see`, bool `[batch, 1, rows, columns]`, into what `model` takes as a 4D mask.

    sdpa takes it as it is; eager adds it to the scores and would read a bool as 0 and 1.
    """
    if implementation(model) == "sdpa":
        return see
    hidden = torch.finfo(model.dtype).min
    return torch.zeros(see.shape, dtype=model.dtype, device=see.device).masked_fill(~see, hidden)


def implementation(model: PreTrainedModel) -> str:
    """How the text layers of `model` compute attention: where it has others too, those may do otherwise."""
    return str(model.config.get_text_config(decoder=True)._attn_implementation)


def refuse_attention(model: PreTrainedModel) -> None:
    """Raise `ValueError` for an attention implementation that takes no tree mask."""
    given = implementation(model)
    if given not in IMPLEMENTATIONS:
        raise ValueError(
            f"attn_implementation={given!r} takes no tree mask: load the base with "
            f'attn_implementation="sdpa" (or "eager")'
        )


def layered_mask(
    model: PreTrainedModel, cache: Cache, see: Tensor, at: Tensor, columns: Tensor, front: Tensor | None = None
) -> Tensor | dict[str, Tensor]:
    """The mask of one forward for every kind of layer that `cache` has.

    Args:
        see: bool `[batch, rows, columns]`, without any window.
        at: int64 `[batch, rows]`, the place of each row in the sequence, padding counted.
        columns: int64 `[batch, columns]`, that of each cached or new column.
        front: bool `[batch, rows, more columns]`, of what stands before these in layers that keep the whole context.
    """
    layers: list[Any] = list(cache.layers)
    windows: dict[int | None, int] = {}  # how many columns their layers show
    for layer in layers:
        window = layer.sliding_window if layer.is_sliding else None
        windows[window] = max(windows.get(window, 0), layer.get_mask_sizes(at.shape[1])[0])
    made = {
        "full_attention" if window is None else "sliding_attention": attention_mask(
            model, _within(see, at, columns, window, shown, front)[:, None]
        )
        for window, shown in windows.items()
    }
    return made if len(made) > 1 else next(iter(made.values()))


def _within(see: Tensor, at: Tensor, columns: Tensor, window: int | None, shown: int, front: Tensor | None) -> Tensor:
    """Cut `see` to a sliding window, whose layers show the last `shown` columns: those before the first one of the
    sequence mean nothing. Without a window `front` comes first."""
    if window is None:
        return see if front is None else torch.cat([front, see], dim=-1)
    near = at[:, :, None] - columns[:, None] < window
    return pad(see & near, (shown - see.shape[-1], 0))
