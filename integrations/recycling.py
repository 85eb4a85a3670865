"""Token recycling (arXiv 2408.08696): what the model said after a token last time is guessed to follow it again.

Knows a table of successors that fills while the model decodes. Needs no training and no forward.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppd_compose import Step, TokenTree, hookimpl
from ppd_compose.lineage import path_log_probs, renumber
from ppd_compose.top import best_tokens, for_host, on_host
from ppd_compose.tree import Floats, Ints, joined

EDGES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95)  # chances, as the model gave them, that are counted together
FORGET = 0.998  # how much of the past counts after each step
PRIOR = 8.0  # guesses that the prior stands for: a chance of last time is worth 0.6 of itself
WORTH = 0.6
READ = 8  # rows of a forward whose successors are taken up: more gain nothing, and each costs 80 us on a CPU
MOST = 256  # successors of a token, or tokens of a path


class TokenRecycling:
    """Drafter: the model's own best tokens after each token, as it gave them last, rejected candidates included.

    The table `[vocab, width]` lasts from one generation to the next; `reset` empties it. Takes part in `extend`: the
    root, and whatever other drafters guess, is continued by what followed those tokens.

    Args:
        width: successors kept of each token.
        depth: most tokens that a path is continued by.
        least: guesses that claim a smaller chance are not made.

    Raises:
        ValueError: width or depth below 1 or above 256, or `least` not between 0 and 1.
    """

    name = "recycling"

    def __init__(self, width: int = 8, depth: int = 6, least: float = 0.01) -> None:
        if not 1 <= width <= MOST or not 1 <= depth <= MOST or not 0 < least < 1:
            raise ValueError(f"need width and depth from 1 to {MOST} and 0 < least < 1, got {width}, {depth}, {least}")
        self.width, self.depth, self.least = width, depth, least
        self.settings = {"width": width, "depth": depth, "least": least}
        self.reset()

    def reset(self) -> None:
        """Forget all that was seen."""
        self.tokens: NDArray[np.int64] = np.zeros((0, self.width), np.int64)
        self.chances: NDArray[np.float64] = np.zeros((0, self.width))
        middle = np.sqrt(np.array([0.01, *EDGES]) * np.array([*EDGES, 1.0]))
        self.hits, self.guesses = PRIOR * WORTH * middle, np.full(len(middle), PRIOR)

    @hookimpl
    def start(self, step: Step) -> None:
        """Make room for the vocabulary, and take up which token follows which in the prompt."""
        if len(self.tokens) > step.vocab_size:  # of another base
            self.reset()
        if (known := len(self.tokens)) < step.vocab_size:
            tokens = np.zeros((step.vocab_size, self.width), np.int64)
            chances = np.zeros((step.vocab_size, self.width))
            tokens[:known], chances[:known] = self.tokens[:known], self.chances[:known]
            # Both of full size, and the one whose size is asked last: another thread may decode meanwhile.
            self.chances, self.tokens = chances, tokens
        for token, following in zip(step.ids, step.ids[1:], strict=False):
            self._see(token, following)

    @hookimpl
    def extend(self, step: Step, tree: TokenTree) -> TokenTree | None:
        """The likeliest continuations of the root and of all paths of `tree`."""
        return self._grown(tree, step.candidates)

    @hookimpl
    def observe(self, step: Step, logits: Tensor) -> None:
        """Count what the last table's guesses were worth; take up what the model said after accepted rows, and where it
        was asked for guesses after the likeliest others."""
        if step.tree is None:
            return
        self._judge(step.tree.tokens[step.path], step.ids[-len(step.path) :])
        rows = _worth_reading(step.tree, step.path, READ if self.name in step.drafting else 0)
        read = logits.index_select(0, torch.tensor(rows, device=logits.device))  # four times as fast as logits[rows]
        claims, best = on_host(*for_host(*best_tokens(read.float(), self.width)))
        words, width = step.tree.tokens[rows], best.shape[1]
        self.tokens[words, :width] = best
        self.chances[words, :width] = np.exp(claims)

    def _see(self, token: int, following: int) -> None:
        """The prompt's own next token goes first; what the model said there is not known."""
        row, chances = self.tokens[token], self.chances[token]
        at = np.flatnonzero((row == following) & (chances > 0))
        end = int(at[0]) if len(at) else self.width - 1
        row[1 : end + 1], chances[1 : end + 1] = row[:end].copy(), chances[:end].copy()
        row[0], chances[0] = following, 0.5

    def _judge(self, tokens: Ints, following: list[int]) -> None:
        self.hits *= FORGET
        self.guesses *= FORGET
        chances = self.chances[tokens]
        bins, known = np.digitize(chances, EDGES), chances > 0
        right = known & (self.tokens[tokens] == np.asarray(following)[:, None])
        self.guesses += np.bincount(bins[known], minlength=len(self.guesses))
        self.hits += np.bincount(bins[right], minlength=len(self.hits))

    def _grown(self, tree: TokenTree, size: int) -> TokenTree | None:
        """`tree` and, below its nodes, the likeliest `size` successors of successors; None when there are none."""
        levels: list[tuple[Ints, Ints, Floats]] = []
        tokens, claims, rows, total = tree.tokens, tree.log_probs, np.arange(len(tree)), len(tree)
        for _ in range(self.depth):
            tokens, above, claims = self._successors(tokens, claims, size)
            if not len(tokens):
                break
            levels.append((tokens, rows[above], claims))
            rows = np.arange(total, total + len(tokens))
            total += len(tokens)
        if not levels:
            return None
        words, parents, scores = (np.concatenate(column) for column in zip(*levels, strict=True))
        # A successor claims less than what it follows, so the best of all are closed under parents.
        best = np.sort(np.argsort(-scores, kind="stable")[:size])
        given = scores - np.concatenate([tree.log_probs, scores])[parents]
        at = renumber(np.concatenate([np.arange(len(tree)), len(tree) + best]), len(tree) + len(scores))
        return _grafted(tree, words[best], at[parents[best]], given[best])

    def _successors(self, tokens: Ints, claims: Floats, size: int) -> tuple[Ints, Ints, Floats]:
        """Of what followed `tokens` the likeliest `size`: tokens, which of `tokens` each follows, and claims."""
        worth = np.log(np.minimum(self.hits / self.guesses, 0.99))
        chances = self.chances[tokens]
        claimed = claims[:, None] + np.where(chances > 0, worth[np.digitize(chances, EDGES)], -np.inf)
        above, rank = np.nonzero(claimed > np.log(self.least))
        best = np.argsort(-claimed[above, rank], kind="stable")[:size]
        above, rank = above[best], rank[best]
        return self.tokens[tokens[above], rank], above, claimed[above, rank]


def _worth_reading(tree: TokenTree, path: list[int], read: int) -> list[int]:
    """The accepted `path` and the likeliest others, `read` rows in all, the least telling first: of equal tokens the
    last stays."""
    likeliest = np.argsort(-tree.log_probs, kind="stable").tolist()
    accepted = set(path)
    others = [row for row in likeliest if row not in accepted]
    return others[: max(read - len(path), 0)][::-1] + path


def _grafted(tree: TokenTree, words: Ints, parents: Ints, given: Floats) -> TokenTree:
    """`tree` with `words` below it, marked as guessed, each with a claim given the row above; one whose path is there
    already stands for its twin, and the claim is its own."""
    known = tree.log_probs - tree.log_probs[tree.parents]
    every = np.concatenate([tree.tokens, words]), np.concatenate([tree.parents, parents])
    tokens, above, (at,) = joined([TokenTree.of(*every, np.zeros(len(every[0])))])
    claims, marks = np.zeros(len(tokens)), np.zeros(len(tokens), np.int64)
    claims[at], marks[at[len(tree) :]] = np.concatenate([known, given]), 1
    return TokenTree(tokens, above, path_log_probs(claims[1:], above), marks)
