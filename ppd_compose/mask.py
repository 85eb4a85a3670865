"""Attention masks in the form that a model's attention implementation takes.

Knows what sdpa and eager want, and windows. Does not know trees: it is told who sees whom.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel

IMPLEMENTATIONS = ("sdpa", "eager")


@dataclass(frozen=True)
class Attention:
    """What the attention of a model takes as its mask."""

    implementation: str
    dtype: torch.dtype

    @classmethod
    def of(cls, model: Any) -> Attention:
        """That of the text layers of `model`, as they are now."""
        return cls(implementation(model), model.dtype)

    def mask(self, see: Tensor) -> Tensor:
        """Turn `see`, bool `[batch, 1, rows, columns]`, into a 4D mask.

        sdpa takes it as it is; eager adds it to the scores and would read a bool as 0 and 1.
        """
        if self.implementation == "sdpa":
            return see
        hidden = torch.finfo(self.dtype).min
        return torch.zeros(see.shape, dtype=self.dtype, device=see.device).masked_fill(~see, hidden)

    def masks(self, see: Mapping[int | None, Tensor]) -> Tensor | dict[str, Tensor]:
        """The mask of one forward, of what rows see in layers of each window, None: without one."""
        made = {
            "full_attention" if window is None else "sliding_attention": self.mask(seen) for window, seen in see.items()
        }
        return made if len(made) > 1 else next(iter(made.values()))


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


@contextmanager
def unplanned(device: torch.device) -> Iterator[None]:
    """Within, masked attention on a CUDA `device` is computed by kernels that take it as it comes.

    From Hopper on torch hands it to cuDNN first, which plans anew for every number of rows and of columns, some tenths
    of a second each, and a tree has other numbers at nearly every step.
    """
    planned = device.type == "cuda" and torch.backends.cuda.cudnn_sdp_enabled()
    if planned:
        torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        if planned:
            torch.backends.cuda.enable_cudnn_sdp(True)


def layered_mask(
    attention: Attention, cache: Cache, see: Tensor, at: Tensor, columns: Tensor, front: Tensor | None = None
) -> Tensor | dict[str, Tensor]:
    """The mask of one forward for every kind of layer that `cache` has.

    Args:
        see: bool `[batch, rows, columns]`, without any window.
        at: int64 `[batch, rows]`, the place of each row in the sequence, padding counted.
        columns: int64 `[batch, columns]`, that of each cached or new column.
        front: bool `[batch, rows, more columns]`, of what stands before these in layers that keep the whole context.
    """
    layers: list[Any] = sorted(cache.layers, key=lambda layer: bool(layer.is_initialized))  # the last ones tell
    kinds = {layer.sliding_window if layer.is_sliding else None: layer for layer in layers}
    return attention.masks(
        {
            window: (_with_front(see, front) if window is None else _within(see, at, columns, layer))[:, None]
            for window, layer in kinds.items()
        }
    )


def _with_front(see: Tensor, front: Tensor | None) -> Tensor:
    return see if front is None or not front.shape[-1] else torch.cat([front, see], dim=-1)


def _within(see: Tensor, at: Tensor, columns: Tensor, layer: Any) -> Tensor:
    """Cut `see` to the window of `layer`, and to the columns that it shows: the last ones, where those before the first
    of the sequence mean nothing."""
    near = at[:, :, None] - columns[:, None] < layer.sliding_window
    shown, _ = layer.get_mask_sizes(at.shape[1])
    return pad(see & near, (shown - see.shape[-1], 0))
