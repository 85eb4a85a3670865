"""What the prompt tokens below one node say: the distributions of each distance's embeddings averaged, and their best.

Knows logits. Does not know prompt tokens, nor which of them were verified.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .top import best_tokens, for_host

WIDTH = 10  # guesses taken from each distance


def guesses(logits: Tensor, known: Tensor | None = None, *, distances: Sequence[int]) -> tuple[Tensor, ...]:
    """Log-probabilities and tokens `[distances, WIDTH]`, `for_host`, of what prompt tokens say.

    Args:
        logits: `[rows, entries]`, those of the embeddings of one distance averaged.
        known: `[entries]` int64, the token of each entry; None: entry i is token i.
        distances: of each row, in ascending order.
    """
    logits = logits.float()
    if len(distances) > distances[-1] + 1:
        logits = torch.stack([average(logits[at]) for at in _groups(distances)])
    log_probs, best = best_tokens(logits, WIDTH)
    return for_host(log_probs, best if known is None else known[best])


def average(logits: Tensor) -> Tensor:
    """Log of the mean distribution `[vocab]` float32 over `logits` `[embeddings, vocab]` (PPD, section 3.2)."""
    return logits.float().log_softmax(-1).logsumexp(0) - math.log(len(logits))


def _groups(distances: Sequence[int]) -> list[slice]:
    """The rows of each of `distances`, which ascend."""
    ends = np.cumsum(np.bincount(distances)).tolist()
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
