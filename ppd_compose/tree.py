"""Candidate trees and appended rows as flat arrays: row 0 is the root, and a parent comes before its children.

Knows how trees are built, cut, merged and checked. Does not know models or where guesses come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .lineage import renumber, row_depths

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

SPREAD = 2**32  # more than there are tokens
NEVER = -1e3  # logarithm of the chance of a path; fainter ones count as this


@dataclass(frozen=True)
class TokenTree:
    """Guesses of what follows the root token, which is decided but not yet in the KV cache."""

    tokens: Ints  # [nodes]
    parents: Ints  # [nodes], -1 for the root
    log_probs: Floats  # [nodes], log of the claimed chance that the whole path is accepted; 0 for the root
    sources: Ints  # [nodes], bit i: drafter i proposed the node

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of(cls, tokens: ArrayLike, parents: ArrayLike, log_probs: ArrayLike) -> TokenTree:
        """From plain lists or arrays `[nodes]`, root first: whole numbers, and claims of whole paths. What they say is
        checked by the loop, which raises `MalformedDraft`."""
        ints = np.int64
        words = np.asarray(tokens, ints)
        return cls(words, np.asarray(parents, ints), np.asarray(log_probs, float), np.zeros(words.shape, ints))

    @classmethod
    def chain(cls, root: int, tokens: Sequence[int] = (), log_probs: Sequence[float] = ()) -> TokenTree:
        """One path; `log_probs[i]` is the claim for `tokens[i]` given those before it."""
        path = np.cumsum([0.0, *log_probs])
        return cls.of([root, *tokens], list(range(-1, len(tokens))), path.tolist())

    @classmethod
    def product(cls, root: int, tokens: Sequence[ArrayLike], log_probs: Sequence[ArrayLike], size: int) -> TokenTree:
        """The `size` likeliest nodes, the root among them, when every depth is guessed on its own.

        Args:
            root: its token.
            tokens: `[depth][rank]` int64, the best first.
            log_probs: `[depth][rank]` floats, the claim for each token, whatever stands before it.
            size: most nodes.
        """
        costs, offset = np.zeros(1), 0
        levels = [(np.array([root]), np.array([-1]), costs)]
        for words, claims in zip(map(np.asarray, tokens), map(np.asarray, log_probs), strict=True):
            # A path among the best of all continues one among the best of its depth: `size` of each depth suffice.
            above, rank = _in_reach(len(costs), len(words), size)
            paid = costs[above] - claims[rank]
            best = paid.argsort(kind="stable")[:size]
            levels.append((words[rank[best]], offset + above[best], paid[best]))
            offset, costs = offset + len(costs), levels[-1][2]
        words, parents, costs = (np.concatenate(column) for column in zip(*levels, strict=True))
        # Stable, and a parent stands before its children: of equals it is taken first.
        kept = costs.argsort(kind="stable")[:size]
        kept.sort()
        above = kept.searchsorted(parents[kept])
        above[0] = -1
        return cls.of(words[kept], above, -costs[kept])

    def marked(self, sources: int) -> TokenTree:
        """The same tree, every node but the root proposed by `sources`."""
        marks = np.full(len(self), sources, np.int64)
        marks[0] = 0
        return TokenTree(self.tokens, self.parents, self.log_probs, marks)

    def lock(self) -> TokenTree:
        """Let its arrays be read-only from now on, and return it."""
        for column in (self.tokens, self.parents, self.log_probs, self.sources):
            column.setflags(write=False)
        return self

    def marked_beyond(self, known: TokenTree, sources: int) -> TokenTree:
        """The same tree, proposed by `sources` where a node is marked or its path is not in `known`; never the root."""
        _, _, (_, at) = joined([known, self])
        marks = np.where((at >= len(known)) | (self.sources != 0), sources, 0)
        marks[0] = 0
        return replace(self, sources=marks)

    def take(self, nodes: Ints) -> TokenTree:
        """The subtree of `nodes`, which start at the root and are closed under parents, each after its parent."""
        at = renumber(nodes, len(self))
        parents = at[self.parents[nodes]]
        return TokenTree(self.tokens[nodes], parents, self.log_probs[nodes], self.sources[nodes])

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` that holds `token`."""
        tokens = self.tokens.tolist()
        if token not in tokens:  # as for most that are asked for
            return None
        pairs = zip(self.parents.tolist(), tokens, strict=True)
        return next((at for at, pair in enumerate(pairs) if pair == (node, token)), None)

    @cached_property
    def chances(self) -> Floats:
        """Claimed chance, for each node, that it is accepted `[nodes]`."""
        chances: Floats = np.exp(self.log_probs)
        return chances

    def stop_chances(self) -> Floats:
        """Claimed chance, for each node, that it is the last one accepted `[nodes]`."""
        stops: Floats = self._stops.copy()
        return stops

    @cached_property
    def _stops(self) -> Floats:
        below = np.bincount(self.parents[1:], self.chances[1:], len(self))
        stops: Floats = np.maximum(self.chances - below, 0.0)
        return stops


@dataclass(frozen=True)
class Appended:
    """Rows with embeddings of their own that hang from tree nodes; their logits come back, they are never accepted."""

    embeddings: Tensor  # [kinds, hidden], on the model's device and in its dtype
    kinds: Ints  # [rows], which of `embeddings` a row carries
    parents: Ints  # [rows], the tree node it sees last, or len(tree) + j for row j of these
    nodes: Ints  # [rows], the tree node that the row's chain hangs from
    gains: Floats  # [rows], tokens that the row is expected to add to the next step
    source: int = 0  # the bit of the drafter whose rows they are, set by the loop

    def __len__(self) -> int:
        return len(self.kinds)

    def marked(self, source: int) -> Appended:
        """The same rows, as those of the drafter whose bit is `source`."""
        return Appended(self.embeddings, self.kinds, self.parents, self.nodes, self.gains, source)

    def take(self, rows: Ints, nodes: Ints, size: int) -> Appended:
        """Rows `rows` of these, over a tree of `size` nodes of which `nodes` are kept."""
        at = renumber(np.concatenate([nodes, size + rows]), size + len(self))
        parents = at[self.parents[rows]]
        kinds, hung, gains = self.kinds[rows], at[self.nodes[rows]], self.gains[rows]
        return Appended(self.embeddings, kinds, parents, hung, gains, self.source)


@lru_cache
def _in_reach(nodes: int, ranks: int, size: int) -> tuple[Ints, Ints]:
    """Of nodes and ranks, each in order of what they cost, those pairs `[pairs]` that can be among the `size` cheapest:
    of an earlier node with an earlier rank none costs more."""
    above, rank = (np.outer(np.arange(1, nodes + 1), np.arange(1, ranks + 1)) <= size).nonzero()
    return above, rank


def stacked_parents(tree: TokenTree, appended: Sequence[Appended]) -> Ints:
    """Parents of all rows of one forward, the tree's first, then each appended block's `[rows]`."""
    parents, shift = [tree.parents], 0
    for rows in appended:
        parents.append(
            np.where(rows.parents < len(tree), rows.parents, rows.parents + shift) if shift else rows.parents
        )
        shift += len(rows)
    return np.concatenate(parents)


def cut(tree: TokenTree, appended: Sequence[Appended], nodes: Ints, riding: Ints) -> tuple[TokenTree, list[Appended]]:
    """Tree and appended blocks of some rows of one forward, which are closed under parents: `nodes` of the tree, each
    after its parent, and those `riding` below them, ascending."""
    begin, kept = len(tree), []
    for rows in appended:
        first, last = riding.searchsorted((begin, begin + len(rows)))
        kept.append(rows.take(riding[first:last] - begin, nodes, len(tree)))
        begin += len(rows)
    return tree.take(nodes), kept


def likeliest_first(tree: TokenTree, nodes: Ints) -> Ints:
    """`nodes` so that the path of likeliest children stands first: when that one is accepted, its keys and values stand
    in the KV cache where they shall stay.

    Args:
        nodes: root first, each after its parent, and the likelier of two before the other.
    """
    order = nodes.tolist()
    heirs = dict(zip(tree.parents[nodes][::-1].tolist(), order[::-1], strict=True))  # the likeliest child of each
    path = [0]
    while (heir := heirs.get(path[-1])) is not None:
        path.append(heir)
    return np.asarray(list(dict.fromkeys([*path, *order])), np.int64)


def shallow(tree: TokenTree, appended: Sequence[Appended], depth: int) -> tuple[TokenTree, Sequence[Appended]]:
    """Tree and appended blocks without the rows deeper than `depth`."""
    if row_depths(tree.parents).max() + max((_most_below_a_node(rows) for rows in appended), default=0) <= depth:
        return tree, appended
    near = np.flatnonzero(row_depths(stacked_parents(tree, appended)) <= depth)
    return cut(tree, appended, near[near < len(tree)], near[near >= len(tree)])


def _most_below_a_node(rows: Appended) -> int:
    """How many of `rows` hang from one node, at most: no chain of them is longer."""
    return int(np.bincount(rows.nodes).max(initial=0))


def joined(trees: Sequence[TokenTree]) -> tuple[Ints, Ints, list[Ints]]:
    """Tokens and parents `[nodes]` of every path of `trees` once, and for each tree where its nodes are there."""
    index: dict[int, int] = {}  # every node, by its token and its parent times `SPREAD`
    places = []
    for tree in trees:
        at: list[int] = []
        for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
            at.append(index.setdefault((at[parent] if parent >= 0 else -1) * SPREAD + token, len(index)))
        places.append(np.asarray(at))
    keys = np.fromiter(index, np.int64, len(index))
    return keys % SPREAD, keys // SPREAD, places


def union(trees: Sequence[TokenTree]) -> TokenTree:
    """Every path of `trees` once; a node keeps its highest claim and all who proposed it."""
    trees = [tree for tree in trees if len(tree) > 1] or trees[:1]
    tokens, parents, places = joined(trees)
    claims, sources = np.full(len(tokens), NEVER), np.zeros(len(tokens), np.int64)
    for tree, at in zip(trees, places, strict=True):
        claims[at] = np.maximum(claims[at], tree.log_probs)
        sources[at] |= tree.sources
    return TokenTree(tokens, parents, claims, sources)
