"""The best entries of rows of logits.

Knows how to search a large vocabulary. Does not know whose logits they are.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .tree import Ints

BLOCK = 128  # entries of the vocabulary that are searched together


def best_tokens(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities, in the dtype of `logits`, and tokens, int64, `[rows, width]` of the `width` best of `logits`
    `[rows, vocab]`, the best first.

    Fewer when the vocabulary is smaller. The best of each block come first and then the best of the best blocks: the
    same as one `topk` over all, which on a CPU is much slower.
    """
    log_probs = logits.log_softmax(-1)
    rows, vocab = logits.shape
    if vocab <= BLOCK * width:
        top, best = log_probs.topk(min(width, vocab))
        return top, best
    padded = nn.functional.pad(log_probs, (0, -vocab % BLOCK), value=-math.inf) if vocab % BLOCK else log_probs
    blocks = padded.view(rows, -1, BLOCK)
    chosen = blocks.amax(-1).topk(width).indices
    top, at = blocks.gather(1, chosen[..., None].expand(-1, -1, BLOCK)).flatten(1).topk(width)
    return top, chosen.gather(1, at // BLOCK) * BLOCK + at % BLOCK


def for_host(claims: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    """`claims` and `tokens`, both of one shape, as `on_host` takes them: off the CPU as one tensor."""
    return (claims.float(), tokens) if claims.device.type == "cpu" else (_packed(claims, tokens),)


def on_host(*told: Tensor) -> tuple[NDArray[np.float32], Ints]:
    """Claims in float32 and tokens, brought from their device in one copy; `told` is what `for_host` made of them.

    What is no number, as where half precision overflows, is claimed by nobody: -inf.
    """
    if len(told) == 1:
        claims, tokens = _unpacked(told[0].numpy(force=True))
    else:
        claims, tokens = told[0].numpy(force=True), told[1].numpy()
    return np.fmax(claims, -np.inf), tokens  # of a number and NaN that takes the number


def _packed(claims: Tensor, tokens: Tensor) -> Tensor:
    """Both as int32, bit for bit: there are fewer tokens than that."""
    return torch.stack([claims.float().view(torch.int32), tokens.int()])


def _unpacked(both: NDArray[np.int32]) -> tuple[NDArray[np.float32], Ints]:
    return both[0].view(np.float32), both[1].astype(np.int64)
