"""The candidate tree of one step while a draft model looks further and further ahead.

Knows which guesses a draft model has looked at and what it expects after them. Does not know models.
"""

from __future__ import annotations

import numpy as np

from ppd_compose import TokenTree
from ppd_compose.lineage import likeliest, row_depths
from ppd_compose.tree import Floats, Ints

from .reading import ROOT, Ahead


class Growth:
    """A tree below a root, of which the draft model has looked at some nodes.

    After a node that was looked at stands what the draft model itself expects next, and further below, each distance
    on its own, what the node's prompt tokens expect; down to the next node that was looked at, which knows better.

    Args:
        root: the token that is decided but not verified.
        depth: most tokens of a path.
        size: most nodes, the root included.
        ahead: what is expected after the root `[1, distances, width]`.
    """

    def __init__(self, root: int, depth: int, size: int, ahead: Ahead) -> None:
        self.root, self.depth, self.size = root, depth, size
        # By row: guesses of the next tokens and their claims, each [distances, width].
        self.ahead: dict[int, tuple[Ints, Floats]] = {ROOT: (ahead.tokens[0], ahead.log_probs[0])}
        self.rows: dict[tuple[int, int], int] = {}  # (parent's row, token): row

    def learn(self, tokens: list[int], parents: list[int], ahead: Ahead) -> None:
        """Take up what is expected after guesses that were looked at, as `pending` gave them."""
        for at, key in enumerate(zip(parents, tokens, strict=True)):
            row = len(self.rows)
            self.rows[key] = row
            self.ahead[row] = ahead.tokens[at], ahead.log_probs[at]

    def pending(self, count: int) -> tuple[list[int], list[int]]:
        """Tokens and parents' rows of the `count` likeliest guesses that are worth a look, a parent before its
        children: not looked at so far, and with room for a token below them."""
        tree, rows = self._grown()
        depths = row_depths(tree.parents)
        order = np.argsort(-tree.log_probs, kind="stable").tolist()
        best = sorted([node for node in order if node not in rows and depths[node] < self.depth][:count])
        rows |= {node: len(self.rows) + at for at, node in enumerate(best)}
        return tree.tokens[best].tolist(), [rows[int(tree.parents[node])] for node in best]

    def tree(self) -> TokenTree:
        """The likeliest nodes."""
        tree, _ = self._grown()
        return tree.take(likeliest(tree.log_probs, self.size))

    def _grown(self) -> tuple[TokenTree, dict[int, int]]:
        """All nodes, and the rows of those that were looked at."""
        tokens, parents, claims, depths = [self.root], [-1], [0.0], [0]
        node_of = {ROOT: 0}
        for row, (guesses, scores) in self.ahead.items():
            if row not in node_of:  # a guess that the draft model itself, having looked at its parent, does not share
                continue
            top = node_of[row]
            reach = self.depth - depths[top]
            made = TokenTree.product(tokens[top], list(guesses[:reach]), list(scores[:reach]), self.size)
            place: list[int | None] = [top]
            columns = (made.tokens.tolist(), made.parents.tolist(), made.log_probs.tolist())
            for token, above, claim in list(zip(*columns, strict=True))[1:]:
                parent = place[above]
                if parent is None:
                    place.append(None)
                    continue
                node = len(tokens)
                known = self.rows.get((row, token)) if above == 0 else None
                if known is not None:
                    node_of[known] = node
                place.append(node if known is None else None)
                tokens.append(token)
                parents.append(parent)
                claims.append(claims[top] + claim)
                depths.append(depths[parent] + 1)
        return TokenTree.of(tokens, parents, claims), {node: row for row, node in node_of.items()}
