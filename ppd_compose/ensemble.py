"""What the prompt tokens below one node say: the distributions of each distance's embeddings averaged, and their best.

Knows logits. Does not know prompt tokens, nor which of them were verified.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .top import best_tokens, for_host

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


def average(logits: Tensor) -> Tensor:
    """Log of the mean distribution `[vocab]` float32 over `logits` `[embeddings, vocab]` (PPD, section 3.2)."""
    return logits.float().log_softmax(-1).logsumexp(0) - math.log(len(logits))
