"""Which rows a forward verifies: as many as make the most tokens per second on this machine.

Knows the price of a second and what rows earn. Does not know drafters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .asking import Asked
from .hookspecs import hookimpl
from .step import Step
from .tree import Appended, Floats, Ints, TokenTree, cut, likeliest_first, stacked_parents
from .worth import Worth, added

SIZES = np.array([1, *2 ** np.arange(2, 16)])  # rows of a forward, or all there are
FEW = 12  # from so many on, all there are in fours
FORGET = 0.98  # how much of the past counts after each step, in the running tokens per second


@dataclass
class _Pace:
    """Running sums, which go on from one sequence to the next, and what the current step costs."""

    tokens: float
    forwards: float  # of one row, that would have taken as long
    curve: Floats  # seconds of a forward by rows, where the current step is
    index: int = -1  # of the current step
    drafting: float = 0.0  # seconds of the current step

    @property
    def rate(self) -> float:
        """Tokens per second in the long run: those of the last steps, and no fewer than plain decoding makes."""
        return max(1.0, self.tokens / self.forwards if self.forwards else 1.0) / float(self.curve[0])

    def count(self, tokens: int, rows: int) -> None:
        """Book a step that made `tokens` by a forward of `rows` rows."""
        seconds = float(self.curve[min(rows, len(self.curve)) - 1]) + self.drafting
        self.tokens = FORGET * self.tokens + tokens
        self.forwards = FORGET * self.forwards + seconds / float(self.curve[0])


class BestRows:
    """Candidates and appended rows compete row by row for expected tokens per second.

    A candidate earns the chance that its path is accepted, an appended row its gain, as far as such gains came true
    before. The cut maximises (expected tokens) - (long-run tokens per second) x (seconds), which is optimal in the
    long run when steps differ. Of all cuts those of a few sizes are tried, the largest of (nearly) all rows there are.
    That is PPD's dynamic sparse tree (section 4) without its offline tables, for any mix of drafters.
    """

    def __init__(self) -> None:
        self.worth = Worth()
        self.asked: dict[str, Asked] = defaultdict(Asked)
        self.tried = -1  # the step at which one that does not pay was last asked
        self.before = (0.0, 0.0)  # the sums of the sequence before, from which the next one goes on

    @hookimpl(trylast=True)
    def start(self, step: Step) -> None:
        """Go on at the pace of the sequence before, if there was one."""
        pace = step.memory[self] = _Pace(*self.before, step.budget.curve(step.length))
        if pace.tokens:
            step.rate = pace.rate

    @hookimpl(trylast=True)
    def ask(self, step: Step, drafter: str) -> bool:
        """Those whose guesses are worth their time at every step; others now and then, one at a time, so that what one
        of them would add shows even if another guesses the same."""
        asked = self.asked[drafter]
        turn = asked.turn() and (asked.wait <= 1 or self.tried != step.index)
        if turn and asked.wait > 1:
            self.tried = step.index
        return turn

    @hookimpl(trylast=True)
    def fit(self, step: Step, tree: TokenTree, appended: Sequence[Appended]) -> tuple[TokenTree, list[Appended]]:
        """Take rows in order of what they earn, a parent before its children, while that pays."""
        pace = step.memory[self]
        pace.index, pace.curve = step.index, step.budget.curve(step.length)
        price = pace.rate * pace.curve
        self._judge(step, tree, pace, price)
        gains = [self.worth.kept(rows) * rows.gains for rows in appended]
        values = _capped(stacked_parents(tree, appended), np.concatenate([tree.chances, *gains]))
        best = (-values).argsort(kind="stable")[: len(price)]
        net = values[best].cumsum() - price[: len(best)]
        sizes = _sizes(len(best))
        keep = best[: sizes[net[sizes - 1].argmax()]]
        drafted = keep < len(tree)
        nodes, riding = likeliest_first(tree, keep[drafted]), keep[~drafted]
        riding.sort()
        fitted, rows = cut(tree, appended, nodes, riding)
        self.worth.promise(step, rows, tree.stop_chances()[nodes])
        return fitted, rows

    @hookimpl
    def observe(self, step: Step) -> None:
        """Keep running sums of tokens and of the budget's own seconds, and tell what a second is worth by them."""
        pace = step.memory[self]
        if pace.index != step.index - 1:  # another plugin decided what fits
            return
        pace.count(len(step.path), step.rows)
        self.before = pace.tokens, pace.forwards
        step.rate = pace.rate

    def _judge(self, step: Step, tree: TokenTree, pace: _Pace, price: Floats) -> None:
        """Book what asking the drafters and their answers brought; `price` `[rows]` is that of a forward in tokens."""
        gained = added(step, tree, price)
        self.worth.judge(step, gained)
        pace.drafting = 0.0
        if step.budget.fixed:
            return
        forward, drafters = float(pace.curve[0]), len(step.drafters)
        for name, gain in zip(step.drafters, gained, strict=True):
            if name in step.drafting:
                self.asked[name].judge(step.drafting[name], gain, pace.rate, forward, drafters)
                pace.drafting += self.asked[name].typical


@lru_cache
def _sizes(rows: int) -> Ints:
    """The sizes that a forward may have where there are `rows` rows. Kernels are made and kept for each, on a CPU some
    four megabytes from twelve rows on: few sizes keep the memory low."""
    most = rows if rows < FEW else rows - rows % 4
    return np.append(SIZES[: np.searchsorted(SIZES, most)], most)


def _capped(parents: Ints, values: Floats) -> Floats:
    """What each row earns, at most what the row it hangs from earns, so that a cut never orphans a row."""
    parents = np.maximum(parents, 0)
    while ((above := values[parents]) < values).any():  # once for every level that holds back a lower one
        values = np.minimum(values, above)
    return values
