"""EAGLE-2's dynamic tree (arXiv 2406.16858, section 4): expand where the draft is surest, then keep the best of all.

Knows scores, frontiers and pools of candidates. Does not know how a row is run, nor whose leaves it grows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppd_compose.device import sent
from ppd_compose.lineage import ancestors, likeliest, renumber, row_depths
from ppd_compose.tree import Ints, TokenTree

from .draft_cache import DraftCache
from .levels import Levels
from .network import Drafted
from .rows import DraftRows
from .whole import Level

Claims = NDArray[np.float32]  # log
ROOT: Ints = np.zeros(1, np.int64)  # the node that a draft of one's own stands below


@dataclass(frozen=True)
class Frontier:
    """Rows whose children are guessed next."""

    drafted: Drafted  # what the rows gave
    rows: Ints  # [rows], their numbers among the candidates that were run; -1 for the root
    depths: Ints  # [rows]
    scores: Claims  # [rows], claimed chance of their paths, log

    @classmethod
    def root(cls, drafted: Drafted) -> Frontier:
        """The root alone, `drafted` `[1, hidden]` being the output of the last accepted pair."""
        at = np.zeros(1, np.int64)
        return cls(drafted, at - 1, at, np.zeros(1, np.float32))

    def children(self, cache: DraftCache, width: int) -> tuple[Claims, Ints]:
        """Claims and tokens `[rows, width]` of the best children, a claim being that of the whole path."""
        log_probs, tokens = cache.children(self.drafted.hidden, width)
        claims: Claims = self.scores[:, None] + log_probs
        return claims, tokens


def levels_below(rows: DraftRows, frontier: Frontier, width: int) -> Iterator[Level]:
    """The children of the frontier, then those of the `width` likeliest of the newest level, each of which is run when
    it is asked for."""
    while True:
        claims, words = frontier.children(rows.cache, width)
        best = np.argsort(-claims.ravel(), kind="stable")[:width]
        yield Level(claims, words, best)
        above, ran = best // words.shape[1], len(rows.see)
        depths = frontier.depths[above] + 1
        drafted = rows.level(words.ravel()[best], above, frontier.drafted.feature, frontier.rows[above], depths)
        frontier = Frontier(drafted, np.arange(ran, ran + len(best)), depths, claims.ravel()[best])


def dynamic_tree(known: TokenTree, nodes: Ints, below: Iterator[Level], levels: Levels, size: int) -> TokenTree:
    """`known` and the `size` likeliest nodes found below its `nodes`, of as many levels `below` as there are to be."""
    tokens, parents, scores, count = [], [], [], len(known)
    for claims, words, best in below:
        tokens.append(words.ravel())
        parents.append(nodes.repeat(words.shape[1]))
        scores.append(claims.ravel())
        if levels.all_made or _settled(scores, best, size) or not levels.another(scores[-1][best]):
            break
        nodes = count + best
        count += len(tokens[-1])
    return _best(known, np.concatenate(tokens), np.concatenate(parents), np.concatenate(scores), size)


def foreign_paths(tree: TokenTree, own: TokenTree, count: int, deepest: int) -> TokenTree | None:
    """The paths to the `count` likeliest leaves of `tree` that `own` does not hold, no deeper than `deepest`."""
    leaf = np.ones(len(tree), bool)
    leaf[tree.parents[1:]] = False
    foreign = tree.marked_beyond(own, 1).sources > 0
    at = np.flatnonzero(leaf & foreign & (row_depths(tree.parents) <= deepest))
    if not len(at):
        return None
    best = at[np.argsort(-tree.log_probs[at], kind="stable")[:count]]
    return tree.take(np.flatnonzero(ancestors(tree.parents)[best].any(0)))


def leaves_of(rows: DraftRows, root: Drafted, tree: TokenTree) -> tuple[Frontier, Ints]:
    """Run all nodes of `tree` below the root, level by level; its leaves as a frontier, and their numbers."""
    depths = row_depths(tree.parents)
    levels = [np.flatnonzero(depths == depth) for depth in range(1, int(depths.max(initial=0)) + 1)]
    leaves = np.setdiff1d(np.arange(len(tree)), tree.parents)
    # By what the device's numbers are looked up, in one copy: the nodes of each level, their parents, the leaves.
    indices = _on([*levels, *(tree.parents[level] for level in levels), leaves], root.feature.device)
    nodes_there, parents_there, leaves_there = indices[: len(levels)], indices[len(levels) : -1], indices[-1]
    ran = np.full(len(tree), -1)  # by node, its number among those that were run
    feature, hidden = (part.repeat(len(tree), 1) for part in root)  # by node
    for level, nodes, parents in zip(levels, nodes_there, parents_there, strict=True):
        start = len(rows.see)
        above, ran_above = np.arange(len(level)), ran[tree.parents[level]]
        made = rows.level(tree.tokens[level], above, feature[parents], ran_above, depths[level])
        feature[nodes], hidden[nodes] = made
        ran[level] = np.arange(start, start + len(level))
    # Rounded down, so that no child claims more than its parent did.
    scores = np.nextafter(tree.log_probs[leaves].astype(np.float32), np.float32(-np.inf))
    drafted = Drafted(feature[leaves_there], hidden[leaves_there])
    return Frontier(drafted, ran[leaves], depths[leaves], scores), leaves


def _on(indices: Sequence[Ints], device: torch.device) -> tuple[Tensor, ...]:
    """All of them on `device`, in one copy."""
    whole = sent(torch.from_numpy(np.concatenate(indices)), device)
    apart: tuple[Tensor, ...] = whole.split([len(one) for one in indices])
    return apart


def _settled(scores: list[Claims], best: Ints, size: int) -> bool:
    """Whether nothing below the newest level can be among the `size` likeliest: a child claims less than its parent."""
    every = np.concatenate(scores)
    return len(every) >= size and bool(np.partition(every, -size)[-size] >= scores[-1][best[0]])


def _best(known: TokenTree, tokens: Ints, parents: Ints, scores: Claims, size: int) -> TokenTree:
    """`known` and the `size` likeliest of the nodes found, whose numbers go on from those of `known`."""
    claims = scores.astype(np.float64)
    kept = len(known) + likeliest(claims, size)
    words = np.concatenate([known.tokens, tokens])
    above = np.concatenate([known.parents, parents])
    claimed = np.concatenate([known.log_probs, claims])
    nodes = np.concatenate([np.arange(len(known)), kept])
    at = renumber(nodes, len(words))
    return TokenTree.of(words[nodes], at[above[nodes]], claimed[nodes])
