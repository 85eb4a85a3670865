"""How far the claims of Medusa heads are to be believed: heads that saw their replies often promise too much.

Knows log-probabilities of guesses and which of them were right. Does not know heads, nor candidate trees.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppd_compose.evidence import FAINTEST, LEAST
from ppd_compose.tree import Floats

LARGEST = 100.0  # of weights that are believed
UNMOVED = (0.0, 1.0)  # offset and slope of claims that are taken as they are


def checked(weights: Sequence[Sequence[float]], heads: int) -> Tensor:
    """`weights` as `[heads, 2]` float64, or a `ValueError` saying what they must be."""
    try:
        made = torch.tensor(weights, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"calibration must be {heads} pairs of numbers: {error}") from None
    if made.shape != (heads, 2) or not bool((made.abs() <= LARGEST).all()) or not bool((made[:, 1] >= 0).all()):
        raise ValueError(f"calibration must be {heads} pairs of an offset and a slope from 0, got {weights!r:.200}")
    return made


def calibrated(log_probs: NDArray[np.floating], weights: Tensor) -> Floats:
    """Logarithms of chances `[heads, ranks]` for guesses of `log_probs` `[heads, ranks]`, as many as were fitted: the
    odds of each guess against all that was not guessed, moved by the head's offset and slope in `weights` `[heads, 2]`.
    """
    scores = _scores(_odds(torch.from_numpy(log_probs)), weights[:, :1], weights[:, 1:])
    claims: Floats = scores.log_softmax(-1)[:, 1:].numpy()
    return claims


def fitted(log_probs: Tensor, right: Tensor) -> list[float]:
    """The offset and slope by which one head's guesses `log_probs` `[points, ranks]`, of which `right` bool
    `[points, ranks]` came true, are likeliest; what is little known stays near 0 and 1."""
    odds, nothing = _odds(log_probs.double().nan_to_num()), torch.tensor(UNMOVED, dtype=torch.float64, device="cpu")
    weights = nothing.clone().requires_grad_()
    search = torch.optim.LBFGS([weights], max_iter=50, line_search_fn="strong_wolfe")
    happened = torch.cat([~right.any(-1, keepdim=True), right], -1)

    def loss() -> Tensor:
        search.zero_grad()
        chances = _scores(odds, weights[0], weights[1]).log_softmax(-1)
        total = 0.5 * (weights - nothing).square().sum() - chances[happened].sum()
        total.backward()
        return total

    with torch.enable_grad():
        search.step(loss)
    offset, slope = weights.clamp(-LARGEST, LARGEST).tolist()
    return [offset, slope] if slope >= 0 else [*UNMOVED]


def _odds(log_probs: Tensor) -> Tensor:
    """The logarithms of each guess's odds against all that was not guessed, within the bounds of the evidence."""
    none = (1 - log_probs.exp().sum(-1, keepdim=True)).clamp(LEAST, 1)
    return log_probs.clamp(FAINTEST, 0).double() - none.log().double()


def _scores(odds: Tensor, offset: Tensor, slope: Tensor) -> Tensor:
    """`[..., 1 + ranks]`, of which the first stands for all that was not guessed."""
    return torch.nn.functional.pad(offset + slope * odds, (1, 0))
