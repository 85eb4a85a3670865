"""A forward that is being computed: where its accepted path will end, and what drafters ask of the device meanwhile.

Knows what the forward leaves on the device, and how it comes to the host in one copy. Does not know drafters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from .device import bringing
from .reached import End, rows_below
from .step import Answer, Reached
from .tree import Appended

Asked = Mapping[Any, Sequence[Tensor]]  # by drafter, what it wants on the host


@dataclass(frozen=True)
class Underway:
    """What the device will have computed of a forward over `nodes` nodes and the rows appended to them."""

    nodes: int
    logits: Tensor  # [rows of the forward, vocab]
    hidden_states: Mapping[int, Tensor]  # by layer [rows of the forward, hidden]
    end: End

    @property
    def reached(self) -> Reached:
        """Where the path ends."""
        states = {layer: told.index_select(0, self.end.node) for layer, told in self.hidden_states.items()}
        return Reached(self.end.picks.index_select(0, self.end.node), states)

    def answers(self, appended: Mapping[Any, Appended]) -> dict[Any, Answer]:
        """By drafter what its rows below the last accepted node say: as many as hang from any node at most, of which
        those beyond what hangs there mean nothing."""
        answers, begin = {}, self.nodes
        for drafter, block in appended.items():
            fullest = np.bincount(block.nodes).argmax()
            kinds = block.kinds[block.nodes == fullest]
            at = rows_below(self.end, begin, len(block), len(kinds))
            states = {layer: told.index_select(0, at) for layer, told in self.hidden_states.items()}
            answers[drafter] = Answer(kinds, self.logits.index_select(0, at), states)
            begin += len(block)
        return answers

    def bringing(self, asked: Asked) -> Callable[[], tuple[list[int], int, dict[Any, Sequence[Tensor]]]]:
        """What is given brings picks of the nodes, the node at which the path ends, and what drafters `asked` for."""
        wanted = [tensor for tensors in asked.values() for tensor in tensors]
        bring = bringing(self.end.picks[: self.nodes], self.end.node, *wanted)

        def told() -> tuple[list[int], int, dict[Any, Sequence[Tensor]]]:
            picks, end, *rest = bring()
            each = iter(rest)
            return picks.tolist(), int(end), {drafter: [next(each) for _ in mine] for drafter, mine in asked.items()}

        return told
