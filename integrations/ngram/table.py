"""A table of what follows the last few tokens, and with which chance, as flat arrays.

Knows contexts, longest first. Does not know where the chances come from, nor files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ppd_compose.tree import Floats, Ints

LARGEST = 2**31  # of a token that is believed
MOST = 16  # tokens of a context
SLACK = 1e-2  # that rounding may add to the chances after one context

Following = list[tuple[int, float]]  # tokens and the logarithms of their chances, the likeliest first


@dataclass(frozen=True)
class Table:
    """Entry `starts[i]` to entry `starts[i + 1]` are what follows context `i`.

    Raises `ValueError` for arrays that do not fit each other, or chances that are none.
    """

    contexts: Ints  # [contexts, order], a shorter one filled up in front with -1
    starts: Ints  # [contexts + 1]
    tokens: Ints  # [entries]
    chances: Floats  # [entries], above 0

    def __post_init__(self) -> None:
        shapes = [array.ndim for array in (self.contexts, self.starts, self.tokens, self.chances)]
        if shapes != [2, 1, 1, 1] or not 1 <= self.order <= MOST:
            raise ValueError(
                f"need contexts of 1 to {MOST} tokens and flat entries, got {self.contexts.shape} contexts"
            )
        if len(self.starts) != len(self.contexts) + 1 or len(self.tokens) != len(self.chances):
            raise ValueError(f"{len(self.contexts)} contexts need one start more, got {len(self.starts)}")
        if self.starts[0] != 0 or self.starts[-1] != len(self.tokens) or (np.diff(self.starts) < 0).any():
            raise ValueError("starts must rise from 0 to the number of entries")
        for what, tokens, least in (("contexts", self.contexts, -1), ("tokens", self.tokens, 0)):
            if tokens.size and (tokens.min() < least or tokens.max() >= LARGEST):
                raise ValueError(f"{what} hold {tokens.min()} to {tokens.max()}, which are no tokens")
        if not ((self.chances > 0) & (self.chances <= 1)).all():
            raise ValueError("chances must lie above 0 and at most at 1")
        totals = np.diff(np.concatenate([[0.0], np.cumsum(self.chances)])[self.starts])
        if (totals > 1 + SLACK).any():
            raise ValueError(f"the chances after one context add up to {totals.max():.3f}")

    @classmethod
    def of(cls, following: Mapping[tuple[int, ...], Mapping[int, float]], order: int) -> Table:
        """Of chances by context and token; contexts have 1 to `order` tokens."""
        known = sorted(following)
        contexts = np.full((len(known), order), -1, np.int64)
        for row, context in enumerate(known):
            contexts[row, order - len(context) :] = context
        starts = np.cumsum([0, *(len(following[context]) for context in known)])
        ranked = [sorted(following[context].items(), key=lambda entry: (-entry[1], entry[0])) for context in known]
        tokens, chances = np.array([entry for entries in ranked for entry in entries]).reshape(-1, 2).T
        return cls(contexts, starts, tokens.astype(np.int64), chances)

    @property
    def order(self) -> int:
        """Tokens of the longest contexts."""
        return int(self.contexts.shape[1])

    @property
    def largest(self) -> int:
        """The largest token that is named, -1 where none is."""
        return max(int(tokens.max(initial=-1)) for tokens in (self.contexts, self.tokens))

    def after(self, text: Sequence[int]) -> Following:
        """What follows the longest ending of `text` that is known; nothing where none is."""
        for length in range(min(self.order, len(text)), 0, -1):
            if (found := self._known.get(tuple(text[-length:]))) is not None:
                return found
        return []

    @cached_property
    def _known(self) -> dict[tuple[int, ...], Following]:
        entries = list(zip(self.tokens.tolist(), np.log(self.chances).tolist(), strict=True))
        starts = self.starts.tolist()
        return {
            tuple(token for token in context if token >= 0): entries[starts[row] : starts[row + 1]]
            for row, context in enumerate(self.contexts.tolist())
        }
