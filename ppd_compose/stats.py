"""What a generation did: forwards, rows, tokens, acceptance by drafter and depth, seconds by stage.

Knows how to count. Does not influence decoding.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .forest import Committed, Forest
from .step import Step

TENTHS = 10  # of the chances that guesses claim, which are counted apart
TOGETHER = 64  # steps whose nodes are counted at a time


class _Stage:
    """Adds the seconds spent inside, less those of stages within, to those of `name`; a dozen times a step, so without
    a generator."""

    __slots__ = ("before", "begin", "name", "stats")

    def __init__(self, stats: Stats, name: str) -> None:
        self.stats, self.name = stats, name

    def __enter__(self) -> None:
        self.before, self.stats.within = self.stats.within, 0.0
        self.begin = time.perf_counter()

    def __exit__(self, *raised: object) -> None:
        spent = time.perf_counter() - self.begin
        self.stats.seconds[self.name] += spent - self.stats.within
        self.stats.within = self.before + spent


@dataclass
class Stats:
    """Counts of one call of `generate`. Depth 1 is the first guessed token.

    Whoever looks while the call goes on sees `expected`, `candidates`, `accepted` and `claims` of all but the last
    steps, no more than 64.
    """

    drafters: tuple[str, ...] = ()
    forwards: int = 0  # the prefill, which yields the first token, and the verify forwards
    tokens: int = 0
    expected: float = 0.0  # tokens, by the chances of all nodes verified
    rows: int = 0  # of all forwards, appended rows included; a prefill counts as one row
    candidates: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    accepted: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    # By stage; "step" is what steps take between their stages, "call" what the call takes beside its steps.
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    # By tenth of the chance that guesses below accepted nodes claimed: how many, the sum of chances, how many right.
    claims: list[list[float]] = field(default_factory=lambda: [[0.0] * 3 for _ in range(TENTHS)])
    waiting: list[Committed] = field(default_factory=list, repr=False)  # steps whose nodes are not counted yet
    within: float = field(default=0.0, repr=False, compare=False)  # seconds of the stages inside the one that goes on

    @property
    def tokens_per_forward(self) -> float:
        """Tokens that a forward made, the prefill counted as one that made the first."""
        return self.tokens / max(self.forwards, 1)

    @property
    def rows_per_forward(self) -> float:
        """Rows that a forward had, appended ones included; a prefill counts as one row."""
        return self.rows / max(self.forwards, 1)

    @property
    def host_seconds(self) -> float:
        """All that steps take beside their verify forwards."""
        return sum(s for stage, s in self.seconds.items() if stage not in ("call", "prefill", "verify"))

    def stage(self, name: str) -> _Stage:
        """Add the seconds spent inside to `name`, also when it raises; those of a stage within are its own."""
        return _Stage(self, name)

    def count(self, step: Step) -> None:
        """Take up one committed step; its nodes when there are enough of them, see `settle`."""
        if step.tree is None:
            return
        self.forwards += 1
        self.tokens += len(step.path)
        self.rows += step.rows
        self.waiting.append(Committed(step.tree, step.path, step.ids[-len(step.path) :]))
        if len(self.waiting) == TOGETHER:
            step.later.append(self.settle)

    def settle(self) -> None:
        """Count the nodes of the steps that wait for it."""
        steps, self.waiting = self.waiting, []
        if not steps:
            return
        forest = Forest.of(steps)
        self.expected += float(np.exp(forest.log_probs).sum())
        depths, sources = forest.depths, forest.sources
        for bit, name in enumerate(self.drafters):
            mine = (sources >> bit & 1) > 0
            self.candidates[name].update(depths[mine].tolist())
            self.accepted[name].update(depths[forest.path][mine[forest.path]].tolist())
        chances, right = forest.judged()
        tenths = np.minimum((TENTHS * chances).astype(np.int64), TENTHS - 1)
        for column, told in enumerate((np.ones(len(chances)), chances, right)):
            for tenth, add in zip(self.claims, np.bincount(tenths, told, TENTHS).tolist(), strict=True):
                tenth[column] += add

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Stats:
        """What `as_dict` told, also after a way through JSON, which makes texts of numbers that are keys."""
        made = cls(tuple(told["drafters"]), told["forwards"], told["tokens"], told["expected"], told["rows"])
        for mine, theirs in ((made.candidates, told["candidates"]), (made.accepted, told["accepted"])):
            for name, counts in theirs.items():
                mine[name].update({int(depth): count for depth, count in counts.items()})
        made.seconds.update(told["seconds"])
        made.claims = [list(tenth) for tenth in told["claims"]]
        return made

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for a report."""
        return {
            "drafters": list(self.drafters),
            "forwards": self.forwards,
            "tokens": self.tokens,
            "expected": self.expected,
            "rows": self.rows,
            "tokens_per_forward": self.tokens_per_forward,
            "rows_per_forward": self.rows_per_forward,
            "candidates": {name: dict(sorted(c.items())) for name, c in self.candidates.items()},
            "accepted": {name: dict(sorted(c.items())) for name, c in self.accepted.items()},
            "seconds": dict(self.seconds),
            "claims": self.claims,
        }
