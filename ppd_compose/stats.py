"""What a generation did: forwards, rows, tokens, acceptance by drafter and depth, seconds by stage.

Knows how to count. Does not influence decoding.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .step import Step
from .tree import judged, row_depths

TENTHS = 10  # of the chances that guesses claim, which are counted apart


@dataclass
class Stats:
    """Counts of one call of `generate`. Depth 1 is the first guessed token."""

    drafters: tuple[str, ...] = ()
    forwards: int = 0  # the prefill, which yields the first token, and the verify forwards
    tokens: int = 0
    expected: float = 0.0  # tokens, by the chances of all nodes verified
    rows: int = 0  # of all forwards, appended rows included; a prefill counts as one row
    candidates: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    accepted: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    # By tenth of the chance that guesses below accepted nodes claimed: how many, the sum of chances, how many right.
    claims: list[list[float]] = field(default_factory=lambda: [[0.0] * 3 for _ in range(TENTHS)])

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / max(self.forwards, 1)

    @property
    def rows_per_forward(self) -> float:
        return self.rows / max(self.forwards, 1)

    @property
    def host_seconds(self) -> float:
        """All that is neither the prefill nor the verify forward."""
        return sum(s for stage, s in self.seconds.items() if stage not in ("prefill", "verify"))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to `name`, also when it raises."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - begin

    def count(self, step: Step) -> None:
        """Take up one committed step."""
        tree = step.tree
        if tree is None:
            return
        self.forwards += 1
        self.tokens += len(step.path)
        self.expected += float(np.exp(tree.log_probs).sum())
        self.rows += step.rows
        depths, sources = row_depths(tree.parents).tolist(), tree.sources.tolist()
        for counts, nodes in ((self.candidates, range(len(tree))), (self.accepted, step.path)):
            for bit, name in enumerate(self.drafters):
                counts[name].update([depths[node] for node in nodes if sources[node] >> bit & 1])
        for chance, came_true in judged(tree, step.path, step.ids[-len(step.path) :]):
            tenth = self.claims[min(int(TENTHS * chance), TENTHS - 1)]
            tenth[:] = tenth[0] + 1, tenth[1] + chance, tenth[2] + came_true

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
