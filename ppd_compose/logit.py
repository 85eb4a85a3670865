"""Conditional logit: which of several alternatives happens, or none of them, learnt one choice at a time.

Knows features and weights. Does not know what the alternatives are.
"""

from __future__ import annotations

import numpy as np

from .tree import Bools, Floats, Ints

FORGET = 0.999  # how much of what was learnt counts after each choice
STEADY = 1e-6  # added to the information, so that it can be inverted


class ConditionalLogit:
    """The chance of alternative x is exp(s(x)) / (1 + the sum of exp(s) over all), s(x) = features(x) . weights; the 1
    stands for none of them (McFadden 1974).

    Weights follow every observed choice by one Newton step on the log likelihood of all choices so far, older ones
    forgotten slowly: no learning rate.

    Args:
        prior: `[features]` weights to start from.
        information: `[features]` how firmly they hold, as the inverse variance of each.
    """

    def __init__(self, prior: Floats, information: Floats) -> None:
        self.prior, self.weights = prior, prior.copy()
        self.held = np.diag(information)
        self.information = self.held.copy()

    def chances(self, features: Floats, group: Ints, groups: int) -> Floats:
        """Of each alternative `[alternatives]`, given those of the same choice, numbered below `groups`."""
        strengths = np.exp(features @ self.weights)
        chances: Floats = strengths / (1.0 + np.bincount(group, strengths, groups))[group]
        return chances

    def learn(self, features: Floats, group: Ints, groups: int, happened: Bools) -> None:
        """`groups` choices among the alternatives `[alternatives, features]`, of which in each at most one happened."""
        chances = self.chances(features, group, groups)
        weighted = chances[:, None] * features
        means = np.zeros((groups, len(self.weights)))
        np.add.at(means, group, weighted)
        forgotten = 1 - FORGET**groups
        self.information += forgotten * (self.held - self.information) + weighted.T @ features - means.T @ means
        slope = (happened - chances) @ features + forgotten * self.held @ (self.prior - self.weights)
        self.weights = self.weights + np.linalg.solve(self.information + STEADY * np.eye(len(slope)), slope)
