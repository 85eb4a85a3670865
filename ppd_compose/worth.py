"""What appended rows turned out to be worth, against the gains that drafters promised for them.

Knows trees, marks and prices. Does not know what the rows are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .step import Step
from .tree import Appended, Bools, Floats, TokenTree

FORGET = 0.98  # how much of the past counts after each step
PRIOR = 5.0  # answers that are taken to have kept their promises


@dataclass
class _Ledger:
    """Tokens promised and gained by the answers to one drafter's rows, each step weighing less than the next."""

    promised: float = 0.0
    gained: float = 0.0
    answers: float = 0.0

    def forget(self) -> None:
        self.promised *= FORGET
        self.gained *= FORGET
        self.answers *= FORGET

    @property
    def kept(self) -> float:
        """How much of a promise is kept."""
        typical = self.promised / self.answers if self.answers else 1.0
        return (self.gained + PRIOR * typical) / (self.promised + PRIOR * typical) if typical else 1.0


class Worth:
    """Corrects gains by how far such promises were kept.

    An answer is worth what the best cut of the step's candidates yields, less the best cut without those that its
    drafter alone proposed, each after paying for its rows. While nothing is bought the past is forgotten, and
    the drafter gets another chance.
    """

    def __init__(self) -> None:
        self.ledgers: dict[int, _Ledger] = defaultdict(_Ledger)

    def judge(self, step: Step, gained: Sequence[float]) -> None:
        """Book what the answers of this step are worth: `gained` by drafter, as `added` tells."""
        for ledger in list(self.ledgers.values()):  # another thread may add one meanwhile
            ledger.forget()
        index, promises = step.memory.pop(self, (0, {}))
        for source, promised in promises.items() if index == step.index - 1 else ():
            if (promise := float(promised[step.path[-1]])) > 0:
                ledger = self.ledgers[source]
                ledger.promised += promise
                ledger.answers += 1
                ledger.gained += gained[source.bit_length() - 1]

    def kept(self, rows: Appended) -> float:
        """The share of the gains of `rows` that is likely to come true; may be above 1."""
        return self.ledgers[rows.source].kept if rows.source in self.ledgers else 1.0

    def promise(self, step: Step, appended: Sequence[Appended], stops: Floats) -> None:
        """Remember, by node, how many tokens the rows below it promise should acceptance end there. A gain is that
        promise times the chance that acceptance ends there, `stops` `[nodes]`, so gains are divided by it."""
        promises = {
            rows.source: np.bincount(rows.nodes, rows.gains, len(stops)) / np.maximum(stops, 1e-9)
            for rows in appended
            if len(rows)
        }
        step.memory[self] = step.index, promises


def added(step: Step, tree: TokenTree, price: Floats) -> list[float]:
    """By drafter, the tokens that the nodes of `tree` which it alone proposed, and what hangs from them, add to the
    best cut, less the price of their rows; `price` `[rows]` is that of a forward in tokens.

    As many appended rows are taken to ride along as did last time.
    """
    riding = step.rows - (0 if step.tree is None else len(step.tree))
    price = price[min(riding, len(price) - 1) :]
    earned = tree.chances
    if len(step.drafters) == 1 and tree.sources[1:].all():  # without it there would be the root alone
        return [_best(np.sort(earned)[::-1], price) - float(earned[0] - price[0])]
    order = (-earned).argsort(kind="stable")
    every = _best(earned[order], price)
    return [every - _best(earned[order[~gone[order]]], price) for gone in _alone(step, tree)]


def _alone(step: Step, tree: TokenTree) -> Bools:
    """Which nodes would not be there without each drafter `[drafters, nodes]`."""
    needed: list[int] = []  # by node, the bits of those without whom it or one above it would not be there
    for source, parent in zip(tree.sources.tolist(), tree.parents.tolist(), strict=True):
        alone = source if source & (source - 1) == 0 else 0
        needed.append(alone | needed[parent] if parent >= 0 else alone)
    gone: Bools = (np.asarray(needed) & 1 << np.arange(len(step.drafters))[:, None]) != 0
    return gone


def _best(earned: Floats, price: Floats) -> float:
    """The most that a cut of descending earnings yields, which takes at least the root."""
    size = min(len(earned), len(price))
    return float((earned[:size].cumsum() - price[:size]).max())
