"""How many levels a draft has: as many as are worth their time on this machine.

Knows what levels and rows cost. Does not know how a level is run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

from torch import Tensor

from ppd_compose.tree import Floats

TIMED = 16  # drafts that are timed; what a level takes is then settled, so that decisions do not follow the clock


@dataclass
class Levels:
    """The levels of one draft: at most `most`, while what they promise pays. Prices are in tokens."""

    most: int
    row: float = 0.0  # price of verifying one more row
    level: float = 0.0  # price of running one more level
    made: int = 0

    def another(self, scores: Tensor) -> bool:
        """Whether to run a level below nodes whose paths have the chances `scores` `[nodes]`, log.

        It adds no more tokens than those chances, each less the row that it takes to verify a child.
        """
        if self.made == self.most or float((scores.exp() - self.row).clamp(min=0.0).sum()) < self.level:
            return False
        self.made += 1
        return True


@dataclass
class LevelPrice:
    """What a level takes, as timed."""

    seconds: list[float] = field(default_factory=list)  # of each draft, by level

    def book(self, seconds: float, levels: Levels) -> None:
        """A draft took `seconds`; its first guesses, which take no level below them, count as one."""
        if len(self.seconds) < TIMED:
            self.seconds.append(seconds / (levels.made + 1))

    def levels(self, most: int, curve: Floats) -> Levels:
        """Levels of the next draft, where a forward of 1, 2, ... rows takes the seconds of `curve` `[rows]`.

        A second is worth at least the tokens of plain decoding. With a fixed number of rows nothing is known of
        seconds, and all levels are run.
        """
        plain, rows = float(curve[0]), float(curve[-1] - curve[0])
        if not self.seconds or not rows:
            return Levels(most)
        return Levels(most, rows / (len(curve) - 1) / plain, median(self.seconds) / plain)
