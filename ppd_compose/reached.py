"""Where the accepted path of a greedy step ends, found on the device: what drafters ask of it next can then be launched
before the host knows.

Knows who sees whom, tokens and picks. Does not know where picks come from, or drafters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class End(NamedTuple):
    """The last accepted node of a tree, and the rows appended below it."""

    picks: Tensor  # int64 [rows], the likeliest token after each
    node: Tensor  # int64 [1]
    below: Tensor  # float32 [rows], each row's own number where it hangs from that node, elsewhere `rows`


def end_of(words: Tensor, nodes: Tensor, see: Tensor, picks: Tensor) -> End:
    """The end of the path that follows `picks`, as `accept.MatchPicks` walks it on the host.

    Args:
        words: `[rows]`, tokens of the nodes first.
        nodes: `[1]`, how many nodes there are.
        see: bool `[rows, rows]`, itself and every row on a row's way to the root. A parent stands before its children,
            so of rows on one path the last is the deepest.
        picks: `[rows]`, the likeliest token after each.
    """
    # Floats, as not every device finds the largest of whole numbers.
    at = torch.arange(len(words), dtype=torch.float32, device=words.device)
    above = see & (at < at[:, None])
    parents = (above * at).amax(1).long()
    right = (words == picks[parents]) | (at == 0)
    accepted = (right | ~see).all(1) & (at < nodes)
    node = (accepted * at).amax(0, keepdim=True)
    hung_from = (above & (at < nodes)).mul(at).amax(1)
    hangs = (hung_from == node) & (at >= nodes)
    return End(picks, node.long(), torch.where(hangs, at, float(len(words))))


def rows_below(end: End, begin: int, rows: int, most: int) -> Tensor:
    """Which rows hang from that node `[most]`, of `rows` ones from `begin` on of which `most` do so at most; where they
    are fewer the last ones are any."""
    mine = end.below[begin : begin + rows].topk(most, largest=False).values
    return mine.long().clamp(max=len(end.below) - 1)
