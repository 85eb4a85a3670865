"""Conditional logit: which of several alternatives happens, or none of them, learnt one choice at a time.

Knows features and weights. Does not know what the alternatives are.
"""

from __future__ import annotations

import numpy as np

from .tree import Bools, Floats, Ints

FORGET = 0.999  # how much of what was learnt counts after each choice
FARTHEST = 1.0  # that one step may move the log-odds of an alternative before it
LARGEST = 1e3  # of weights that are believed
SURE = 500.0  # scores above it count as this: `exp` of more overflows
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
        self.steady = STEADY * np.eye(len(prior))

    def restore(self, weights: Floats, information: Floats) -> None:
        """Go on from these `weights` `[features]` and `information` `[features, features]`, once learnt by another.

        Raises `ValueError` when they are of other features, or no numbers.
        """
        if weights.shape != self.weights.shape or information.shape != self.information.shape:
            raise ValueError(f"weights {weights.shape} of information {information.shape}, not {self.weights.shape}")
        if not (
            (abs(weights) <= LARGEST).all()
            and np.isfinite(information).all()
            and np.linalg.eigvalsh(information).min() > -STEADY
        ):
            raise ValueError("weights that are no numbers, or information that is not positive")
        self.weights, self.information = weights, information

    def chances(self, features: Floats, group: Ints) -> Floats:
        """Chance of each alternative `[alternatives]`, given those of the same choice.

        Args:
            features: `[alternatives, features]`.
            group: `[alternatives]`, which choice each belongs to, numbered from 0.
        """
        return shares(features @ self.weights, group)

    def learn(self, features: Floats, group: Ints, happened: Bools) -> None:
        """Take up choices, in each of which at most one alternative `happened` `[alternatives]`; the rest as in
        `chances`."""
        chances = self.chances(features, group)
        weighted = chances[:, None] * features
        means = (np.arange(group.max() + 1)[:, None] == group).astype(float) @ weighted
        forgotten = 1 - FORGET ** len(means)
        self.information += forgotten * (self.held - self.information) + weighted.T @ features - means.T @ means
        slope = (happened - chances) @ features + forgotten * self.held @ (self.prior - self.weights)
        change = np.linalg.solve(self.information + self.steady, slope)
        # The curvature holds nearby only: no alternative's log-odds may move far at once.
        self.weights = self.weights + change * min(1.0, FARTHEST / max(np.abs(features @ change).max(), 1e-9))


def shares(scores: Floats, group: Ints) -> Floats:
    """Chance of each alternative `[alternatives]` of these `scores`, given those of the same choice; `group` tells
    which choice each belongs to, numbered from 0."""
    strengths = np.exp(np.minimum(scores, SURE))
    chances: Floats = strengths / (1 + np.bincount(group, strengths))[group]
    return chances
