"""Several committed steps seen as one forest, so that what they tell is found by a few calls, whatever their number.

Knows candidate trees and accepted paths. Does not know who counts what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .lineage import row_depths
from .tree import NEVER, Bools, Floats, Ints, TokenTree


@dataclass(frozen=True)
class Committed:
    """One step: what was verified, the nodes of its accepted path, and the token after each of them."""

    tree: TokenTree
    path: Sequence[int]
    following: Sequence[int]


@dataclass(frozen=True)
class Forest:
    """The trees of several steps, one after the other; a root's parent is -1."""

    tokens: Ints  # [nodes]
    parents: Ints  # [nodes]
    log_probs: Floats  # [nodes]
    sources: Ints  # [nodes]
    path: Ints  # [accepted], the nodes of all accepted paths
    following: Ints  # [accepted], the token after each of them

    @classmethod
    def of(cls, steps: Sequence[Committed]) -> Forest:
        """Of at least one step."""
        sizes = [len(step.tree) for step in steps]
        begins = np.cumsum([0, *sizes[:-1]])
        parents = np.concatenate([step.tree.parents for step in steps])
        paths = [len(step.path) for step in steps]
        return cls(
            np.concatenate([step.tree.tokens for step in steps]),
            np.where(parents < 0, -1, parents + begins.repeat(sizes)),
            np.concatenate([step.tree.log_probs for step in steps]),
            np.concatenate([step.tree.sources for step in steps]),
            np.concatenate([step.path for step in steps]).astype(np.int64) + begins.repeat(paths),
            np.concatenate([step.following for step in steps]).astype(np.int64),
        )

    @property
    def depths(self) -> Ints:
        """Depth of every node `[nodes]`, 0 for a root."""
        return row_depths(self.parents)

    def choices(self) -> tuple[Ints, Bools]:
        """For each node below an accepted one which of `path` that is, -1 for other nodes `[nodes]`; and whether the
        node came true `[nodes]`."""
        at = np.full(len(self.tokens) + 1, -1)  # the last entry is that of a root's parent
        at[self.path] = np.arange(len(self.path))
        choice = at[self.parents]
        return choice, (choice >= 0) & (self.tokens == self.following[choice])

    def judged(self) -> tuple[Floats, Bools]:
        """Of each node below an accepted one, the chance that it claimed given its parent, and whether it came true."""
        choice, right = self.choices()
        (below,) = (choice >= 0).nonzero()
        claims = np.maximum(self.log_probs, NEVER)
        return np.exp(claims[below] - claims[self.parents[below]]), right[below]
