"""PPD's dynamic sparse trees, made beforehand from accuracies (PPD section 4): to compare with, and for prompt tokens
alone where every forward shall have the same rows.

Knows accuracies by distance and rank. Sees nothing of a step but how many distances were guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .accuracy import marginal_gains
from .hookspecs import hookimpl
from .lineage import row_depths
from .prompt import PromptTokens
from .step import Step
from .tree import Appended, Floats, Ints, TokenTree

ROUNDS = 50  # of improving trees and state values in turns; a handful is the rule


@dataclass(frozen=True)
class SparseTree:
    """Which candidates and how many prompt tokens a forward carries when so many distances were guessed."""

    shape: TokenTree  # its tokens are ranks, its log_probs those of the accuracies
    depths: Ints  # [nodes]
    prompts: Ints  # [nodes], prompt tokens below each


class OfflinePromptTokens(PromptTokens):
    """Prompt tokens whose trees were chosen beforehand for `rows` rows a forward. Takes part alone.

    Raises:
        ValueError: fewer rows than the root and one prompt token need.
    """

    name = "ppd-offline"

    def __init__(self, prompt_tokens: PromptTokens, rows: int) -> None:
        super().__init__(
            prompt_tokens.embeddings, prompt_tokens.accuracy.tolist(), prompt_tokens.identity, prompt_tokens.training,
            prompt_tokens.keys_values,
        )  # fmt: skip
        self.trees = sparse_trees(self.accuracy, rows, self.embeddings.shape[1])

    @hookimpl
    def propose(self, step: Step) -> TokenTree | None:
        """The tree of as many distances as were guessed, filled with the best tokens of each."""
        tree = self._tree(step)
        if len(tree.shape) == 1:
            return None
        _, guesses = self._guesses(step, step.answers[self])
        tokens = guesses[tree.depths - 1, tree.shape.tokens]
        tokens[0] = step.ids[-1]
        return TokenTree.of(tokens, tree.shape.parents, tree.shape.log_probs)

    @hookimpl
    def append(self, step: Step, tree: TokenTree) -> Appended:
        """As many prompt tokens below each node as were chosen for it."""
        (n, v, _), every = self.embeddings.shape, super().append(step, tree)
        wanted = np.arange(n) < self._tree(step).prompts[:, None]  # [nodes, n]
        nodes = np.arange(len(tree))
        return every.take(np.flatnonzero(np.repeat(wanted, v, axis=1)), nodes, len(tree))

    @hookimpl
    def fit(self, tree: TokenTree, appended: Sequence[Appended]) -> tuple[TokenTree, Sequence[Appended]]:
        """All of it: it was fitted beforehand."""
        return tree, appended

    def _tree(self, step: Step) -> SparseTree:
        answer = step.answers.get(self)
        known = 0 if answer is None or not len(answer.kinds) else int(answer.kinds[-1]) // self.embeddings.shape[1] + 1
        return self.trees[known]


def sparse_trees(accuracy: Floats, rows: int, ensemble: int = 1) -> list[SparseTree]:
    """For 0, 1, ... n distances guessed, the tree of `rows` rows that makes the most tokens a forward in the long run.

    The next forward starts from as many distances as prompt tokens hung below the last accepted node, the root
    included: trees and the values of those states are improved in turns (Howard 1960). PPD's own builder counts a
    forward of which nothing is accepted as one more state, worth nothing, which decoding never enters.

    Args:
        accuracy: `[n, ranks]`, how often the guess of that rank is right.
        rows: of one forward, prompt tokens and the root included.
        ensemble: rows of one prompt token.
    """
    if rows < 1 + ensemble:
        raise ValueError(f"the root and one prompt token of {ensemble} embeddings need {1 + ensemble} rows, got {rows}")
    values = np.cumsum([0.0, *marginal_gains(accuracy, rows)])
    for _ in range(ROUNDS):
        trees = [_best_tree(accuracy[:known], values, rows, ensemble) for known in range(len(values))]
        improved = _state_values(trees)
        if np.allclose(improved, values, atol=1e-9):
            break
        values = improved
    return trees


def _state_values(trees: Sequence[SparseTree]) -> Floats:
    """Tokens that each state is ahead of the state without guesses `[n + 1]`; none is worth less than the one before,
    nor gains more than the one before gained."""
    gains = np.minimum.accumulate(np.maximum(np.diff([0.0, *_solved(trees)[1:]]), 0.0))
    return np.cumsum([0.0, *gains])


def _solved(trees: Sequence[SparseTree]) -> Floats:
    """The long-run tokens a forward, if accuracies hold and do not depend on each other, then the values of states
    1 ... n, of value = tokens - long run + value of the next state, that of state 0 being 0."""
    states = len(trees)
    moves = np.stack([np.bincount(t.prompts, t.shape.stop_chances(), states) for t in trees])
    tokens = np.array([np.exp(t.shape.log_probs).sum() for t in trees])
    system = np.eye(states) - moves
    system[:, 0] = 1.0
    solved: Floats = np.linalg.lstsq(system, tokens, rcond=None)[0]
    return solved


def _best_tree(accuracy: Floats, values: Floats, rows: int, ensemble: int) -> SparseTree:
    """Of every number of candidates, the best paths and the best prompt tokens for the rows left; the best of these."""
    ranks = np.argsort(-accuracy, kind="stable")
    claims = np.log(np.clip(np.take_along_axis(accuracy, ranks, axis=1), 1e-6, 1.0))
    full = TokenTree.product(0, list(ranks), list(claims), rows)
    order = np.argsort(-full.log_probs, kind="stable")
    best, most = None, -np.inf
    for size in range(1, min(len(full), rows) + 1):
        shape = full.take(np.sort(order[:size]))
        prompts, gained = _hung(shape.stop_chances(), np.diff(values), (rows - size) // ensemble)
        if (worth := float(np.exp(shape.log_probs).sum()) + gained) > most:
            best, most = (shape, prompts), worth
    assert best is not None
    return SparseTree(best[0], row_depths(best[0].parents), best[1])


def _hung(stops: Floats, gains: Floats, count: int) -> tuple[Ints, float]:
    """Below which nodes `count` prompt tokens are worth most `[nodes]`, and how much; `gains` descend."""
    worth = stops[:, None] * gains
    chosen = np.argsort(-worth, axis=None, kind="stable")[:count]
    prompts = np.bincount(chosen // len(gains), minlength=len(stops))
    return prompts, float(worth.ravel()[chosen].sum())
