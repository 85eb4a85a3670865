"""What an array of parents tells of its rows: how deep they are, who is whose ancestor, what their paths claim.

Knows flat arrays in which a parent comes before its children. Does not know tokens or where rows come from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .tree import Bools, Floats, Ints


def row_depths(parents: Ints) -> Ints:
    """Depth of every row `[rows]`, 0 for a root."""
    depths: list[int] = []
    for parent in parents.tolist():
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return np.array(depths, np.int64)


def path_log_probs(given: Floats, parents: Ints) -> Floats:
    """Claims for whole paths `[nodes]` of claims for all nodes but the root, given those above them `[nodes - 1]`; the
    root's is 0."""
    claims = [0.0, *given.tolist()]
    for node, parent in enumerate(parents.tolist()[1:], 1):
        claims[node] += claims[parent]
    return np.array(claims)


def ancestors(parents: Ints) -> Bools:
    """Who sees whom `[rows, rows]`: a row sees itself and every row on its way to the root."""
    rows = len(parents)
    seen: list[bytearray] = []  # a byte for each row
    for row, parent in enumerate(parents.tolist()):
        mine = bytearray(seen[parent] if parent >= 0 else rows)
        mine[row] = True
        seen.append(mine)
    return np.frombuffer(bytearray().join(seen), bool).reshape(rows, rows)


def likeliest(claims: NDArray[np.floating], size: int) -> Ints:
    """The `size` rows of the highest `claims` `[rows]`, ascending. Where no row claims more than its parent they are
    closed under parents: of equals the earlier one is taken."""
    return np.sort((-claims).argsort(kind="stable")[:size])


def renumber(kept: Ints, size: int) -> Ints:
    """Old row -> new row `[size + 1]` when only `kept` stay; the last entry maps -1 to -1."""
    at = np.full(size + 1, -1, np.int64)
    at[kept] = np.arange(len(kept))
    return at
