"""A whole draft in one go: a device chooses by itself which candidates are expanded, and tells all levels at once.

Knows EAGLE-2's choice among the children of a level (arXiv 2406.16858, section 4.1). Does not know how many levels pay,
nor the tree that is made of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppd_compose.device import bringing
from ppd_compose.tree import Ints

if TYPE_CHECKING:
    from .draft_cache import DraftCache


class Level(NamedTuple):
    """Children of some rows, and which of them are expanded next."""

    claims: NDArray[np.float32]  # [rows, width], logarithms of whole paths' chances
    tokens: Ints  # [rows, width]
    best: Ints  # [at most width], the likeliest first, counted through all rows


def whole_draft(
    cache: DraftCache, features: Tensor, numbers: Tensor, *, levels: int, width: int, shown: int
) -> tuple[Tensor, ...]:
    """Run some pairs, and below the last one `levels` levels of the `width` likeliest candidates.

    Args:
        cache: the head, with room for all of that.
        features: `[pairs, hidden]`.
        numbers: as `DraftCache.ran_pairs` takes them.
        levels: that are run; of one more the children are told.
        width: children of each row, and rows of a level; no more than there are tokens.
        shown: columns that every row is shown, of which those count that it may see.

    Returns what the last pair gave, two tensors `[1, hidden]`; then of all levels, one behind the other, what a `Level`
    holds.
    """
    columns = torch.arange(shown, device=numbers.device)
    first, at, last = numbers[:3].split(1)
    begin, itself = at + last + 1, columns[:width, None] == columns[:width]
    root = drafted = cache.ran_pairs(numbers, features, (columns < begin)[None])
    scores, own, told = drafted.hidden.new_zeros(1, dtype=torch.float32), begin.new_zeros(1, 0, dtype=torch.bool), []
    for level in range(levels + 1):
        log_probs, tokens = cache.best_children(drafted.hidden, width)
        claims = (scores[:, None] + log_probs).flatten()
        claims = claims.where(~claims.isnan(), -torch.inf)  # what is no number is claimed by nobody
        scores, best = claims.topk(width)
        told.append((claims, tokens.flatten(), best))
        if level < levels:
            above = best // width
            own = torch.cat([own[above], itself], dim=1)
            positions = (first + begin + level).expand(width)
            given = tokens.flatten()[best], drafted.feature[above], positions, _seen(columns - begin, own)
            drafted = cache.ran_candidates(begin + level * width, *given)
    return (*root, *(torch.cat(parts) for parts in zip(*told, strict=True)))


def _seen(columns: Tensor, own: Tensor) -> Tensor:
    """Which `columns` `[columns]`, counted from the first candidate's, rows see `[rows, columns]` that see all before
    that, and of the candidates those that `own` `[rows, candidates]` says."""
    inside = (columns >= 0) & (columns < own.shape[1])
    return (columns < 0) | (own[:, columns.clamp(0, own.shape[1] - 1)] & inside)


def levels_of(told: tuple[Tensor, ...], width: int) -> Iterator[Level]:
    """The levels of a whole draft, of whose output `told` is the last part, brought to the host in one copy."""
    claims, tokens, best = (each.numpy() for each in bringing(*told)())
    rows, begin = 1, 0
    for chosen in best.reshape(-1, width):
        end = begin + rows * width
        yield Level(claims[begin:end].reshape(rows, width), tokens[begin:end].reshape(rows, width), chosen)
        rows, begin = width, end
