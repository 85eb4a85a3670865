"""One chance for every candidate, from the claims of all drafters: the default `merge`.

Knows what drafters claimed and what the model said. Does not know budgets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .forest import Committed, Forest
from .hookspecs import hookimpl
from .lineage import path_log_probs, row_depths
from .logit import ConditionalLogit, shares
from .step import Step
from .tree import NEVER, Bools, Floats, Ints, TokenTree, joined

DEPTHS = 3  # candidates of depth 1, of depth 2, and all deeper ones are judged apart
LEAST = 0.02  # chance that is always left for tokens that a drafter did not name
TOGETHER = 32  # steps are learnt from as many at a time as make up an eighth of all, and no more than these
NAMES_IT, LOG_ODDS, NAMES_OTHERS, IS_BEST = range(4)  # what a drafter says of a node, each a column of its features
KINDS = 4
FAINTEST = -8.0  # logarithm of a claim; fainter ones count as this
# Weights to start from, and how firmly they hold, as the inverse variance of each. Claims of a single drafter are taken
# as they are; those of several say in part the same.
ALONE, ALONE_HOLDS = (0.0, 1.0, -1.0, 0.0), (16.0, 16.0, 16.0, 16.0)
AMONG, AMONG_HOLDS = (0.5, 0.7, -1.0, 0.0), (4.0, 4.0, 4.0, 16.0)


@dataclass(frozen=True)
class Heard:
    """A merged tree, and what each drafter said about each of its nodes."""

    tree: TokenTree
    features: Floats  # [nodes, drafters x KINDS + 1]
    depths: Ints  # [nodes], at most DEPTHS


class Evidence:
    """Drafters' claims about the children of a node are pooled: the log-odds that each drafter gives a child against
    none of those it named, weighed and added (a logarithmic opinion pool; Genest and Zidek 1986).

    A drafter has four weights: for naming a child, for the log-odds that it gives, for naming others only, and for its
    best guess there. One more is for a child that several name. They are learnt while decoding, by depth, from the
    children of accepted nodes, of which the model told which one was right.

    Args:
        drafters: their names; the i-th is the i-th bit of a node's sources.
    """

    name = "evidence"

    def __init__(self, drafters: Sequence[str]) -> None:
        weights, holds = (AMONG, AMONG_HOLDS) if len(drafters) > 1 else (ALONE, ALONE_HOLDS)
        prior = np.append(np.tile(weights, len(drafters)), 0.0)
        held = np.append(np.tile(holds, len(drafters)), holds[0])
        self.learners = [ConditionalLogit(prior, held) for _ in range(DEPTHS)]
        self.drafters = tuple(drafters)
        self.waiting: list[tuple[Heard, Sequence[int]]] = []  # steps that are not learnt from yet
        self.seen = 0  # steps, those that wait included

    def learnt(self) -> dict[str, Any]:
        """What was learnt, as plain data."""
        self.settle()
        learners = [{"weights": x.weights.tolist(), "information": x.information.tolist()} for x in self.learners]
        return {"drafters": list(self.drafters), "learnt": learners}

    @classmethod
    def restored(cls, drafters: Sequence[str], told: Mapping[str, Any], where: str) -> Evidence:
        """Go on from what `learnt` told. Raises `ValueError`, naming `where` it stands, when it is something else, or
        was learnt with other drafters."""
        if told.get("drafters") != list(drafters):
            raise ValueError(
                f"{where} was learnt with drafters {told.get('drafters')}, this composition has {list(drafters)}: "
                "compose the same ones in the same order, or leave calibration out"
            )
        evidence = cls(drafters)
        try:
            for learner, learnt in zip(evidence.learners, told["learnt"], strict=True):
                learner.restore(np.asarray(learnt["weights"], float), np.asarray(learnt["information"], float))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{where} is no calibration that was saved by this version: {error}") from None
        return evidence

    @hookimpl(trylast=True)
    def merge(self, step: Step, trees: Sequence[TokenTree]) -> TokenTree:
        """Every path of every drafter once, with the pooled chance of the whole path."""
        trees = [tree for tree in trees if len(tree) > 1] or trees[:1]
        tokens, parents, places = joined(trees) if len(trees) > 1 else _alone(trees[0])
        claims, sources = np.full((len(tokens), len(self.drafters)), -np.inf), np.zeros(len(tokens), np.int64)
        for tree, at in zip(trees, places, strict=True):
            (mine,) = tree.sources.nonzero()
            if len(mine):
                drafter = int(tree.sources[mine[0]]).bit_length() - 1
                paths = np.maximum(tree.log_probs, NEVER)
                claims[at[mine], drafter] = np.minimum(paths[mine] - paths[tree.parents[mine]], 0.0)
                sources[at] |= tree.sources
        features, depths = self._features(claims, parents), np.minimum(row_depths(parents), DEPTHS)
        log_probs = self._pooled(features, parents, depths)
        merged = TokenTree(tokens, parents, log_probs, sources)
        step.memory[self] = Heard(merged, features, depths)
        return merged

    @hookimpl
    def observe(self, step: Step) -> None:
        """Learn, when there is time, from what followed the accepted nodes."""
        heard = step.memory.pop(self, None)
        if heard is None or len(heard.tree) == 1:
            return
        self.waiting.append((heard, step.ids[-len(step.path) :]))
        self.seen += 1
        if len(self.waiting) >= min(TOGETHER, 1 + self.seen // 8):
            step.later.append(self.settle)

    def settle(self) -> None:
        """Learn from the steps that wait for it."""
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return
        forest = Forest.of([_followed(heard.tree, following) for heard, following in waiting])
        features = np.concatenate([heard.features for heard, _ in waiting])
        depths = np.concatenate([heard.depths for heard, _ in waiting])
        choice, right = forest.choices()
        for depth, learner in enumerate(self.learners, 1):
            (among,) = ((choice >= 0) & (depths == depth)).nonzero()
            if len(among):
                met = np.zeros(len(forest.path), np.int64)
                met[choice[among]] = 1
                learner.learn(features[among], (met.cumsum() - 1)[choice[among]], right[among])

    def _features(self, claims: Floats, parents: Ints) -> Floats:
        """What was said of each node `[nodes, drafters x KINDS + 1]`. By each drafter: did it name the token, with what
        log-odds, did it name others only, was this its best guess there; then, did several name it."""
        named: Bools = claims > -np.inf
        above, drafters, flat = np.maximum(parents, 0), claims.shape[1], claims.ravel()
        # A cell for each node and drafter: what it said of that node's children.
        cells = above if drafters == 1 else (above[:, None] * drafters + np.arange(drafters)).ravel()
        mass = np.bincount(cells, np.exp(flat), claims.size).reshape(claims.shape)
        highest = np.full(claims.size, -np.inf)
        np.maximum.at(highest, cells, flat)
        features = np.zeros((len(claims), KINDS * drafters + 1))
        features[:, NAMES_IT:-1:KINDS] = named
        log_odds = np.maximum(claims, FAINTEST) - np.log(np.maximum(1 - mass, LEAST))[above]
        features[:, LOG_ODDS:-1:KINDS] = named * log_odds
        features[:, IS_BEST:-1:KINDS] = named & (flat == highest[cells]).reshape(claims.shape)
        if drafters > 1:
            features[:, NAMES_OTHERS:-1:KINDS] = (mass > 0)[above] & ~named
            features[:, -1] = named.sum(1) > 1
        return features

    def _pooled(self, features: Floats, parents: Ints, depths: Ints) -> Floats:
        """Log of the chance of each path `[nodes]`."""
        weights = np.array([learner.weights for learner in self.learners])
        scores = (features * weights[depths - 1]).sum(1)  # the root's means nothing
        return path_log_probs(np.log(np.maximum(shares(scores[1:], parents[1:]), 1e-12)), parents)


def _alone(tree: TokenTree) -> tuple[Ints, Ints, list[Ints]]:
    """As `joined` of `tree` alone, whose paths differ. Copies: a drafter may write its next tree where this one is."""
    return tree.tokens.copy(), tree.parents.copy(), [np.arange(len(tree))]


def _followed(tree: TokenTree, following: Sequence[int]) -> Committed:
    """The nodes of `tree`, from the root on, after which it is known what `following`; what follows the last token is
    not, whether or not it was drafted."""
    path: list[int] = []
    node: int | None = 0
    for token in following:
        if node is None:
            break
        path.append(node)
        node = tree.child(node, token)
    return Committed(tree, path, following[: len(path)])
