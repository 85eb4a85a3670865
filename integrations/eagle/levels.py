"""How many levels a draft has: as many as are worth their time on this machine.

Knows what levels and rows cost. Does not know how a level is run.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

import numpy as np
from numpy.typing import NDArray

from ppd_compose.asking import TIMED, TRIED
from ppd_compose.tree import Floats


@dataclass
class Levels:
    """The levels of one draft: at most `most`, while what they promise pays. Prices are in tokens."""

    most: int
    row_price: float = 0.0  # of verifying one more row
    level_price: float = 0.0  # of running one more level
    made: int = 0
    begin: float = 0.0  # of the first level, in seconds of the performance counter
    ahead: int = 0  # parts that took that time, where levels are run before anybody asks for them

    @property
    def all_made(self) -> bool:
        """Whether there is no other level to ask for."""
        return self.made == self.most

    def run_ahead(self, depth: int, wanted: Iterable[int]) -> int:
        """How many of `depth` levels to run in one go, before it is known which pay: one more than was `wanted` in any
        of the last drafts, or the power of two above, so that there are few numbers. They, and what comes before them,
        are timed from now on; no more than these are made."""
        run = min(depth, 1 << max(wanted, default=depth).bit_length())
        self.most = min(self.most, run)
        self.begin, self.ahead = time.perf_counter(), run + 1
        return run

    def another(self, scores: NDArray[np.floating]) -> bool:
        """Whether to run a level below nodes whose paths have the chances `scores` `[nodes]`, log.

        It adds no more tokens than those chances, each less the row that it takes to verify a child.
        """
        gain = float((np.exp(scores) - self.row_price).clip(min=0.0).sum())
        if self.all_made or gain < self.level_price:
            return False
        self.begin = self.begin or time.perf_counter()
        self.made += 1
        return True


@dataclass
class LevelPrice:
    """What a level takes, as timed in the first drafts; then it is settled, as what a drafter takes is."""

    seconds: list[float] = field(default_factory=list)  # of a level, by draft

    def book(self, levels: Levels) -> None:
        """A draft of these `levels` has just ended."""
        timed = levels.ahead or levels.made
        if timed > min(levels.ahead, 1) and len(self.seconds) < TIMED:  # of no level nothing is known
            self.seconds.append((time.perf_counter() - levels.begin) / timed)

    def levels(self, most: int, curve: Floats | None, rate: float = 0.0) -> Levels:
        """Levels of the next draft, where a forward of 1, 2, ... rows takes the seconds of `curve` `[rows]`.

        A second is worth `rate` tokens, and at least those of plain decoding. All levels are run until some drafts were
        timed, and where nothing is known of seconds (None).
        """
        if len(self.seconds) < TRIED or curve is None:
            return Levels(most)
        rise, worth = float(curve[-1] - curve[0]), max(rate, 1.0 / float(curve[0]))
        return Levels(most, rise / max(len(curve) - 1, 1) * worth, median(self.seconds) * worth)
