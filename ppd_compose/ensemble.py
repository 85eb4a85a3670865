"""What the prompt tokens below one node say: the distributions of each distance's embeddings averaged, and their best.

Knows logits, and who of an ensemble sees whom. Does not know which prompt tokens were verified.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .device import for_host
from .top import best_tokens
from .tree import Ints

WIDTH = 10  # guesses taken from each distance


def guesses(logits: Tensor, known: Tensor | None = None, *, distances: Sequence[int]) -> tuple[Tensor, ...]:
    """Log-probabilities and tokens `[distances, WIDTH]`, `for_host`, of what prompt tokens say.

    Args:
        logits: `[rows, entries]`, those of the embeddings of one distance averaged.
        known: `[entries]` int64, the token of each entry; None: entry i is token i.
        distances: of each row; there is one row for each at least.
    """
    logits, far = logits.float(), max(distances) + 1
    if len(distances) > far:
        rows: list[list[Tensor]] = [[] for _ in range(far)]
        for distance, row in zip(distances, logits, strict=True):
            rows[distance].append(row)
        logits = torch.stack([average(torch.stack(mine)) for mine in rows])
    log_probs, best = best_tokens(logits, WIDTH)
    return for_host(log_probs, best if known is None else known[best])


def average(logits: Tensor, dim: int = 0) -> Tensor:
    """Log of the mean distribution, float32, over the embeddings along `dim` of `logits` `[..., vocab]` (PPD, section
    3.2)."""
    return logits.float().log_softmax(-1).logsumexp(dim) - math.log(logits.shape[dim])


def ensemble_parents(below: Ints, begin: int, n: int, v: int) -> Ints:
    """Parents `[len(below), n, v]` of prompt tokens that hang from rows `below`, numbered from `begin` on: an embedding
    sees the same embedding of the prompt tokens before it (the ensemble mask; PPD, section 3.2)."""
    rows = begin + np.arange(len(below) * n * v).reshape(len(below), n, v)
    parents: Ints = rows - v
    parents[:, :1] = below[:, None, None]  # there may be none at all
    return parents
