"""EAGLE-2's dynamic tree (arXiv 2406.16858, section 4): expand where the draft is surest, then keep the best of all.

Knows scores, frontiers and pools of candidates. Does not know how a row is run, nor whose leaves it grows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ppd_compose.top import best_tokens
from ppd_compose.tree import Ints, TokenTree, ancestors, renumber, row_depths

from .borrowed import Parts
from .levels import Levels
from .network import Drafted
from .rows import DraftRows


@dataclass(frozen=True)
class Frontier:
    """Rows whose children are guessed next."""

    drafted: Drafted  # what the rows gave
    nodes: Tensor  # int64 [rows], their numbers in the tree that is made
    rows: Tensor  # int64 [rows], their numbers among the candidates that were run; -1 for the root
    depths: Tensor  # int64 [rows]
    scores: Tensor  # float [rows], claimed chance of their paths, log

    @classmethod
    def root(cls, drafted: Drafted) -> Frontier:
        """The root alone, `drafted` `[1, hidden]` being the output of the last accepted pair."""
        nodes = torch.zeros(1, dtype=torch.long, device=drafted.hidden.device)
        return cls(drafted, nodes, nodes - 1, nodes, nodes.float())

    def children(self, parts: Parts, width: int) -> tuple[Tensor, Tensor]:
        """Claims and tokens `[rows, width]` of the best children, a claim being that of the whole path."""
        log_probs, tokens = best_tokens(parts.output(self.drafted.hidden), width)
        tokens = tokens if parts.target_ids is None else parts.target_ids[tokens]
        # The sum of a softmax may round to more than 1, a claim must not.
        return self.scores[:, None] + log_probs.clamp(max=0.0), tokens


def dynamic_tree(
    rows: DraftRows, known: TokenTree, frontier: Frontier, levels: Levels, width: int, size: int
) -> TokenTree:
    """`known` and the `size` likeliest nodes found below the frontier, which are nodes of `known`.

    The children of the frontier are guessed, then, for as many `levels` as there are to be, those of the `width`
    likeliest of the newest level.
    """
    tokens, parents, scores, count = [], [], [], len(known)
    while True:
        claims, words = frontier.children(rows.parts, width)
        tokens.append(words.ravel())
        parents.append(frontier.nodes.repeat_interleave(words.shape[1]))
        scores.append(claims.ravel())
        best = scores[-1].topk(min(width, len(scores[-1]))).indices
        if levels.all_made or _settled(scores, best, size) or not levels.another(scores[-1][best]):
            break
        above = best // words.shape[1]
        ran = len(rows.see)
        drafted = rows.level(
            tokens[-1][best], frontier.drafted.feature[above], frontier.rows[above], frontier.depths[above] + 1
        )
        fresh = torch.arange(ran, ran + len(best), device=best.device)
        frontier = Frontier(drafted, count + best, fresh, frontier.depths[above] + 1, scores[-1][best])
        count += len(tokens[-1])
    return _best(known, torch.cat(tokens), torch.cat(parents), torch.cat(scores), size)


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


def leaves_of(rows: DraftRows, root: Drafted, tree: TokenTree) -> Frontier:
    """Run all nodes of `tree` below the root, level by level; its leaves as a frontier."""
    device, depths = root.hidden.device, row_depths(tree.parents)
    ran = np.full(len(tree), -1)
    feature, hidden = (part.repeat(len(tree), 1) for part in root)
    for depth in range(1, int(depths.max(initial=0)) + 1):
        at = np.flatnonzero(depths == depth)
        nodes, above = _on(at, device), _on(tree.parents[at], device)
        start = len(rows.see)
        made = rows.level(
            _on(tree.tokens[at], device), feature[above], _on(ran[tree.parents[at]], device), _on(depths[at], device)
        )
        feature[nodes], hidden[nodes] = made
        ran[at] = np.arange(start, start + len(at))
    at = np.setdiff1d(np.arange(len(tree)), tree.parents)
    # Rounded down, so that no child claims more than its parent did.
    scores = torch.from_numpy(np.nextafter(tree.log_probs[at].astype(np.float32), np.float32(-np.inf))).to(device)
    nodes, drafted = _on(at, device), Drafted(feature[at], hidden[at])
    return Frontier(drafted, nodes, _on(ran[at], device), _on(depths[at], device), scores)


def _settled(scores: list[Tensor], best: Tensor, size: int) -> bool:
    """Whether nothing below the newest level can be among the `size` likeliest: a child claims less than its parent."""
    every = torch.cat(scores)
    return len(every) >= size and bool(every.topk(size).values[-1] >= scores[-1][best[0]])


def _best(known: TokenTree, tokens: Tensor, parents: Tensor, scores: Tensor, size: int) -> TokenTree:
    """`known` and the `size` likeliest of the nodes found, whose numbers go on from those of `known`."""
    claims = scores.numpy(force=True).astype(np.float64)
    # Stable, and a parent stands before its children: of equals it is taken first.
    kept = len(known) + np.sort(np.argsort(-claims, kind="stable")[:size])
    words = np.concatenate([known.tokens, tokens.numpy(force=True)])
    above = np.concatenate([known.parents, parents.numpy(force=True)])
    claimed = np.concatenate([known.log_probs, claims])
    nodes = np.concatenate([np.arange(len(known)), kept])
    at = renumber(nodes, len(words))
    return TokenTree.of(words[nodes], at[above[nodes]], claimed[nodes])


def _on(numbers: Ints, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers)).to(device)
