"""Static candidate trees in Medusa's form: a list of paths, each the ranks of its tokens at depth 1, 2 and so on.

Knows how to turn guesses by depth and rank into such a tree. Does not know which guesses there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ppd_compose import TokenTree
from ppd_compose.lineage import ancestors
from ppd_compose.tree import Bools, Floats, Ints

# The 63 nodes of `mc_sim_7b_63` in medusa/model/medusa_choices.py of github.com/FasterDecoding/Medusa, the default
# of the official code, as the number of children of each path, whose ranks are its digits.
_CHILDREN = {
    "": 10, "0": 10, "1": 7, "2": 3, "3": 2, "4": 1, "5": 1, "6": 1, "7": 1, "8": 1, "9": 1, "00": 10, "01": 3,
    "02": 2, "03": 1, "04": 1, "05": 1, "06": 1, "07": 1, "10": 2, "20": 1, "000": 2,
}  # fmt: skip
MC_SIM_7B_63 = [[*map(int, path), rank] for path, count in _CHILDREN.items() for rank in range(count)]


@dataclass(frozen=True)
class Choices:
    """A checked static tree; row 0 is the root, then shorter paths before longer ones."""

    depths: Ints  # [nodes - 1], of the nodes below the root, counted from 0
    ranks: Ints  # [nodes - 1]
    parents: Ints  # [nodes]
    see: Bools  # [nodes, nodes]

    @classmethod
    def of(cls, paths: Sequence[Sequence[int]], heads: int) -> Choices:
        """Check `paths` for `heads` heads.

        Raises:
            ValueError: no path, an empty, repeated or negative one, one deeper than there are heads, or one whose
                beginning is not itself a path.
        """
        known = sorted({tuple(path) for path in paths}, key=lambda path: (len(path), path))
        if not known or not known[0] or len(known) < len(paths):
            raise ValueError("choices must be different paths of at least one rank each, such as [[0], [1], [0, 0]]")
        if len(known[-1]) > heads:
            raise ValueError(f"choices reach depth {len(known[-1])}, there are {heads} heads: shorten the paths")
        at = {(): 0, **{path: row for row, path in enumerate(known, 1)}}
        for path in known:
            if path[:-1] not in at:
                raise ValueError(f"choices hold {list(path)} without {list(path[:-1])}: add the path that it continues")
            if not all(isinstance(rank, int) and 0 <= rank < 2**31 for rank in path):
                raise ValueError(f"choices hold {list(path)}: a rank is a whole number from 0, the best guess")
        parents = np.asarray([-1, *(at[path[:-1]] for path in known)], np.int64)
        depths = np.asarray([len(path) - 1 for path in known], np.int64)
        return cls(depths, np.asarray([path[-1] for path in known], np.int64), parents, ancestors(parents))

    @property
    def width(self) -> int:
        """How many guesses of a depth the tree needs."""
        return int(self.ranks.max()) + 1

    def tree(self, root: int, tokens: NDArray[np.int64], log_probs: NDArray[np.floating]) -> TokenTree:
        """The tree below `root` with `tokens` and the claims `log_probs` `[depth, rank]`, the best first."""
        own: Floats = np.concatenate([[0.0], log_probs[self.depths, self.ranks].astype(float)])
        return TokenTree.of([root, *tokens[self.depths, self.ranks]], self.parents, self.see @ own)
