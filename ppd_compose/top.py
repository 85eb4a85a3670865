"""The best entries of rows of logits.

Knows how to search a large vocabulary. Does not know whose logits they are.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

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
