"""The rows that a draft layer has run for one sequence: its accepted pairs, and below them one step's candidates.

Knows which columns of the draft's own KV cache are whose, and who sees whom. Does not choose tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ppd_compose.tree import Bools, Ints

from .draft_cache import DraftCache
from .network import Drafted
from .whole import Level

WAITING = 64  # steps whose hidden states wait to be fused: several at once take hardly longer than one


class DraftRows:
    """Accepted pairs, which stay, and candidates, whose place the next accepted pairs take.

    Args:
        cache: the head at work, of no other sequence meanwhile, holding nothing.
        first: position of the first pair; those before it were in the base's KV cache already.
    """

    def __init__(self, cache: DraftCache, first: int) -> None:
        self.cache, self.parts, self.first, self.accepted = cache, cache.parts, first, 0
        # Of accepted positions that were not run yet: features, and of the latest the hidden states to make them of.
        self.features: list[Tensor] = []
        self.pending: list[list[Tensor]] = []
        self.drop()

    def drop(self) -> None:
        """Forget the candidates."""
        self.see: Bools = np.zeros((0, 0), bool)  # candidates by candidates

    def learn(self, states: Sequence[Tensor]) -> None:
        """Hidden states of accepted positions, `[positions, state_size]` for each of the layers that are read.

        They are run when the head is asked again: one that does not pay is asked seldom.
        """
        like = self.parts.output.weight
        self.pending.append([state.to(like) for state in states])
        if len(self.pending) == WAITING:
            self._fuse()

    def accept(self, ids: Sequence[int]) -> Drafted:
        """Run the pairs that became known, drop all candidates, and return the last pair's output `[1, hidden]`.

        `ids` is the whole sequence; its last token, the root, completes the last pair.
        """
        features = self._new()
        last = self.cache.pairs(self.first, self.accepted, ids[-len(features) :], features)
        self.accepted += len(features)
        return last

    def draft(self, ids: Sequence[int], levels: int, width: int) -> tuple[Drafted, Iterator[Level]]:
        """The same, and in one go what `levels` levels of `width` candidates below it give; they are dropped then."""
        features = self._new()
        told = self.cache.draft(self.first, self.accepted, ids[-len(features) :], features, levels, width)
        self.accepted += len(features)
        return told

    def _new(self) -> Tensor:
        """Features `[pairs, hidden]` of the pairs that became known; drops all candidates."""
        if self.pending:
            self._fuse()
        features, self.features = torch.cat(self.features), []
        self.drop()
        return features

    def level(self, tokens: Ints, above: Ints, features: Tensor, parents: Ints, depths: Ints) -> Drafted:
        """Run candidates below the accepted pairs.

        Args:
            tokens: `[rows]`.
            above: `[rows]`, which of `features` their parents gave.
            features: `[any, hidden]`.
            parents: `[rows]`, the candidate that each hangs from, counted since `accept`; -1 for the root.
            depths: `[rows]`, 1 for children of the root.
        """
        size, new = len(self.see), len(tokens)
        before = np.concatenate([self.see, np.zeros((1, size), bool)])[parents]
        own = np.concatenate([before, np.eye(new, dtype=bool)], axis=1)
        self.see = np.concatenate([np.pad(self.see, ((0, 0), (0, new))), own])
        positions = self.first + self.accepted - 1 + depths
        return self.cache.candidates(self.accepted, tokens, above, features, positions, own)

    def _fuse(self) -> None:
        self.features.append(self.parts.network.fuse([torch.cat(layer) for layer in zip(*self.pending, strict=True)]))
        self.pending = []
