"""How often guesses were right, by distance and rank, and what prompt tokens are worth by it (PPD section 4).

Knows shares. Does not know drafters, nor how the shares were found.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .tree import Floats, TokenTree

RANKS = 1000  # of guesses whose accuracy is told, at most


def checked_shares(accuracy: Sequence[Sequence[float]], n: int) -> Floats:
    """`accuracy` `[n, ranks]`, or a `ValueError` saying what it must be."""
    try:
        shares: Floats = np.asarray(accuracy, float)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"accuracy must be {n} rows of as many shares each: {error}") from None
    if (
        shares.ndim != 2
        or len(shares) != n
        or not 1 <= shares.shape[1] <= RANKS
        or not (abs(shares - 0.5) <= 0.5).all()
    ):
        raise ValueError(f"accuracy must be {n} rows of 1 to {RANKS} shares between 0 and 1, got {accuracy!r:.200}")
    return shares


def marginal_gains(accuracy: Floats, nodes: int) -> Floats:
    """f(k) - f(k - 1) for k = 1 ... n `[n]`, where f(k) is what the best tree of `nodes` candidates is expected to
    yield from k distances, each guessed on its own (PPD section 4, the price of removing a prompt token)."""
    claims = np.log(np.clip(-np.sort(-accuracy), 1e-6, 1.0)).tolist()  # of guesses, the likeliest first
    ranks = [list(range(len(row))) for row in claims]
    expected = [
        float(np.exp(TokenTree.product(0, ranks[:k], claims[:k], nodes + 1).log_probs[1:]).sum())
        for k in range(1, len(claims) + 1)
    ]
    gains: Floats = np.maximum(np.diff([0.0, *expected]), 0.0)
    return gains
