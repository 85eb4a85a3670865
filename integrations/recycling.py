"""Token recycling (arXiv 2408.08696): what the model said after a token last time is guessed to follow it again.

Knows a table of successors that fills while the model decodes. Needs no training and no forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppd_compose import Step, TokenTree, hookimpl
from ppd_compose.device import for_host, on_host, rows_of
from ppd_compose.lineage import likeliest, path_log_probs, renumber
from ppd_compose.top import best_tokens
from ppd_compose.tree import NEVER, Floats, Ints, joined

EDGES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95)  # chances, as the model gave them, that are counted together
FORGET = 0.998  # how much of the past counts after each step
PRIOR = 8.0  # guesses that the prior stands for: a chance of last time is worth 0.6 of itself
WORTH = 0.6
READ = 8  # rows of a forward whose successors are taken up: more gain nothing, and each costs 80 us on a CPU
MOST = 256  # successors of a token, or tokens of a path


@dataclass
class Successors:
    """What one base said: after each token the likeliest, and how often such guesses were right."""

    tokens: Ints  # [vocab, width]
    chances: Floats  # [vocab, width], 0 where nothing is known
    hits: Floats  # [bins of chances]
    guesses: Floats  # [bins of chances]

    @classmethod
    def nothing(cls, vocab: int, width: int) -> Successors:
        """At first, with chances as the prior has them."""
        middle = np.sqrt(np.array([0.01, *EDGES]) * np.array([*EDGES, 1.0]))
        shape = vocab, width
        return cls(np.zeros(shape, np.int64), np.zeros(shape), PRIOR * WORTH * middle, np.full(len(middle), PRIOR))

    def read(self, ids: list[int]) -> None:
        """Take up which token follows which in a prompt: its own next tokens go first, the latest one foremost; what
        the model said there is not known."""
        width = self.tokens.shape[1]
        latest: dict[int, dict[int, None]] = {}
        for token, following in zip(ids[-2::-1], ids[:0:-1], strict=True):
            seen = latest.setdefault(token, {})
            if len(seen) < width:
                seen[following] = None
        for token, seen in latest.items():
            row, chances = self.tokens[token], self.chances[token]
            stay = [at for at in np.flatnonzero(chances).tolist() if row[at] not in seen][: width - len(seen)]
            end = len(seen) + len(stay)
            row[:end], chances[:end] = [*seen, *row[stay]], [*[0.5] * len(seen), *chances[stay]]
            chances[end:] = 0

    def judge(self, tokens: Ints, following: list[int]) -> None:
        """Count what the guesses after `tokens` `[accepted]` were worth, where `following` came."""
        self.hits *= FORGET
        self.guesses *= FORGET
        chances = self.chances[tokens]
        bins, known = np.digitize(chances, EDGES), chances > 0
        right = known & (self.tokens[tokens] == np.asarray(following)[:, None])
        self.guesses += np.bincount(bins[known], minlength=len(self.guesses))
        self.hits += np.bincount(bins[right], minlength=len(self.hits))

    def after(self, tokens: Ints, claims: Floats, least: float, size: int) -> tuple[Ints, Ints, Floats]:
        """Of what followed `tokens` the likeliest `size` that claim `least`: tokens, which of `tokens` each follows,
        and claims of whole paths, where those up to `tokens` claim `claims`."""
        worth = np.log(np.minimum(self.hits / self.guesses, 0.99))
        chances = self.chances[tokens]
        claimed = claims[:, None] + np.where(chances > 0, worth[np.digitize(chances, EDGES)], -np.inf)
        above, rank = np.nonzero(claimed > np.log(least))
        best = np.argsort(-claimed[above, rank], kind="stable")[:size]
        above, rank = above[best], rank[best]
        return self.tokens[tokens[above], rank], above, claimed[above, rank]


class TokenRecycling:
    """Drafter: the model's own best tokens after each token, as it gave them last, rejected candidates included.

    A table `[vocab, width]` for each base lasts from one generation to the next; `reset` empties them. Takes part in
    `extend`: the root, and whatever other drafters guess, is continued by what followed those tokens.

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

    def __getstate__(self) -> dict[str, Any]:
        # Copied or pickled without what was seen, which is of models of this process.
        return {name: value for name, value in vars(self).items() if name != "of"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.reset()

    def reset(self) -> None:
        """Forget all that was seen."""
        # By the embedding, which compositions share.
        self.of: WeakKeyDictionary[nn.Module, Successors] = WeakKeyDictionary()

    @hookimpl
    def start(self, step: Step, model: PreTrainedModel) -> None:
        """Find what this base said before, and take up which token follows which in the prompt."""
        embedding: nn.Module = model.get_input_embeddings()
        successors = self.of.get(embedding)
        if successors is None or len(successors.tokens) != step.vocab_size:  # resized
            successors = self.of[embedding] = Successors.nothing(step.vocab_size, self.width)
        step.memory[self] = successors
        successors.read(step.ids)

    @hookimpl
    def extend(self, step: Step, tree: TokenTree) -> TokenTree | None:
        """The likeliest continuations of the root and of all paths of `tree`."""
        return self._grown(step.memory[self], tree, step.candidates)

    @hookimpl
    def observe(self, step: Step, logits: Tensor) -> None:
        """Count what the last table's guesses were worth; take up what the model said after accepted rows, and where it
        was asked for guesses after the likeliest others."""
        if step.tree is None:
            return
        successors: Successors = step.memory[self]
        successors.judge(step.tree.tokens[step.path], step.ids[-len(step.path) :])
        rows = _worth_reading(step.tree, step.path, READ if self.name in step.drafting else 0)
        if self in step.foretold:
            claims, best = (told[rows] for told in on_host(*step.foretold[self]))
        else:
            claims, best = on_host(*self._best(rows_of(logits, rows)))
        words, width = step.tree.tokens[rows], best.shape[1]
        successors.tokens[words, :width] = best
        successors.chances[words, :width] = np.exp(claims)

    @hookimpl
    def foretell(self, logits: Tensor) -> tuple[Tensor, ...]:
        """The model's best tokens after all nodes: a device has them nearly as fast as those after some."""
        return self._best(logits)

    def _best(self, logits: Tensor) -> tuple[Tensor, ...]:
        """Claims and tokens `[rows, width]`, `for_host`, of the best after each row of `logits` `[rows, vocab]`."""
        return for_host(*best_tokens(logits.float(), self.width))

    def _grown(self, successors: Successors, tree: TokenTree, size: int) -> TokenTree | None:
        """`tree` and, below its nodes, the likeliest `size` successors of successors; None when there are none."""
        levels: list[tuple[Ints, Ints, Floats]] = []
        begun = np.maximum(tree.log_probs, NEVER)
        tokens, claims, rows, total = tree.tokens, begun, np.arange(len(tree)), len(tree)
        for _ in range(self.depth):
            tokens, above, claims = successors.after(tokens, claims, self.least, size)
            if not len(tokens):
                break
            levels.append((tokens, rows[above], claims))
            rows = np.arange(total, total + len(tokens))
            total += len(tokens)
        if not levels:
            return None
        words, parents, scores = (np.concatenate(column) for column in zip(*levels, strict=True))
        best = likeliest(scores, size)
        given = scores - np.concatenate([begun, scores])[parents]
        at = renumber(np.concatenate([np.arange(len(tree)), len(tree) + best]), len(tree) + len(scores))
        return _grafted(tree, words[best], at[parents[best]], given[best])


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
    paths = np.maximum(tree.log_probs, NEVER)
    known = paths - paths[tree.parents]
    every = np.concatenate([tree.tokens, words]), np.concatenate([tree.parents, parents])
    tokens, above, (at,) = joined([TokenTree.of(*every, np.zeros(len(every[0])))])
    claims, marks = np.zeros(len(tokens)), np.zeros(len(tokens), np.int64)
    claims[at], marks[at[len(tree) :]] = np.concatenate([known, given]), 1
    return TokenTree(tokens, above, path_log_probs(claims[1:], above), marks)
