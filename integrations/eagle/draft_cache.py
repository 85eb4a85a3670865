"""The draft layer's keys and values of one sequence, in memory that stays, and its forwards over them.

Knows columns, and what a device is told in one go. Does not know which columns were accepted, nor choose tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from ppd_compose.device import apart, for_host, in_one, on_host
from ppd_compose.recorded import MANY, recorded_rows, shown_columns
from ppd_compose.recorders import Recorder
from ppd_compose.replayed import RecordingStore, Replayed
from ppd_compose.top import best_tokens
from ppd_compose.tree import Bools, Ints

from .borrowed import Parts
from .network import Drafted, Rope, Rows
from .whole import Level, levels_of, whole_draft

SPARE = 256  # columns that there is room for beyond those that are needed


class DraftCache:
    """A head at work on one sequence at a time. Where a device can record forwards, each is launched at once.

    Args:
        parts: the head, on its device.
        make_recorder: makes what records its forwards; None: they are launched.
    """

    def __init__(self, parts: Parts, make_recorder: Callable[[], Recorder] | None = None) -> None:
        self.parts, self.store = parts, make_recorder and RecordingStore(make_recorder, "forwards of an EAGLE head")
        self.keys: Tensor | None = None  # [kv heads, room, head_dim]
        self.values: Tensor | None = None
        runs = self._pairs, self._candidates, self._children, partial(whole_draft, self)
        self.run_pairs, self.run_candidates, self.run_children, self.run_draft = (
            Replayed(run, parts.device, self.store) for run in runs
        )

    @property
    def at_once(self) -> bool:
        """Whether a draft is best made in one go, as the host would wait for each level."""
        return self.store is not None or self.parts.device.type != "cpu"

    @property
    def recorded(self) -> int:
        """How much was recorded so far: what takes part in that takes longer than it will."""
        return 0 if self.store is None else self.store.made

    def clear(self) -> None:
        """Hold nothing of a sequence that has ended."""
        if self.store is None:
            self.keys = self.values = None
        elif self.keys is not None and self.values is not None:
            # A hidden column counts nothing only where it holds a number.
            self.keys.zero_()
            self.values.zero_()

    def pairs(self, first: int, at: int, tokens: Sequence[int], features: Tensor) -> Drafted:
        """Run pairs at the columns from `at` on, position `first` being that of column 0; what the last of them gives
        `[1, hidden]`, over all columns up to its own. Of a single layer the others are needed as keys and values alone.

        Args:
            tokens: of the pairs.
            features: `[pairs, hidden]`.
        """
        few, idle = self._idle(len(tokens))
        end = at + len(tokens)
        shown = self.room(features, end + idle, few)
        told = in_one(_whole([first, at, len(tokens) - 1], tokens, [0] * idle), np.arange(shown)[None] < end)
        run = self.run_pairs if few else self.run_pairs.launched
        return Drafted(*run(pad(features, (0, 0, 0, idle)), told, rows=1))

    def draft(
        self, first: int, at: int, tokens: Sequence[int], features: Tensor, levels: int, width: int
    ) -> tuple[Drafted, Iterator[Level]]:
        """What the last of some pairs gives, as `pairs` does, and in the same go `levels` levels of `width` candidates
        below it, with the children of the last level."""
        few, idle = self._idle(len(tokens))
        width = min(width, len(self.parts.output.weight))
        shown = self.room(features, at + len(tokens) + max(idle, levels * width), few)
        numbers = torch.from_numpy(_whole([first, at, len(tokens) - 1], tokens, [0] * idle))
        run = self.run_draft if few else self.run_draft.launched
        *root, claims, words, best = run(
            pad(features, (0, 0, 0, idle)), numbers, levels=levels, width=width, shown=shown
        )
        return Drafted(*root), levels_of((claims, words, best), width)

    def _idle(self, pairs: int) -> tuple[bool, int]:
        """Whether a forward of so many pairs is recorded, and how many are added that mean nothing."""
        few = self.store is not None and pairs <= MANY
        return few, recorded_rows(pairs) - pairs if few else 0

    def candidates(
        self, begin: int, tokens: Ints, above: Ints, features: Tensor, positions: Ints, see: Bools
    ) -> Drafted:
        """Run candidates, those before them in this step being at the columns from `begin` on.

        Args:
            tokens: `[rows]`.
            above: `[rows]`, which of `features` is that of each one's parent.
            features: `[any, hidden]`.
            positions: `[rows]`.
            see: `[rows, own]`, which of the step's candidates they see, all of them but `rows` being there already.
                Columns before `begin` are seen by all.
        """
        rows, own = see.shape
        end = begin + own
        every = np.zeros((rows, self.room(features, end, self.store is not None)), bool)
        every[:, :begin], every[:, begin:end] = True, see
        numbers = _whole([end - rows], tokens, above, positions)
        return Drafted(*self.run_candidates(features, in_one(numbers, every), rows=rows))

    def children(self, hidden: Tensor, width: int) -> tuple[NDArray[np.float32], Ints]:
        """Logarithms of chances and tokens `[rows, width]` of the best after `hidden` `[rows, hidden]`."""
        return on_host(*self.run_children(hidden, width=width))

    def _pairs(self, features: Tensor, told: Tensor, *, rows: int) -> tuple[Tensor, ...]:
        """What is recorded of `pairs`, of which `rows` are asked what they give."""
        numbers, see = apart(told, 3 + len(features))
        return self.ran_pairs(numbers, features, see.view(rows, -1))

    def ran_pairs(self, numbers: Tensor, features: Tensor, see: Tensor) -> Drafted:
        """What the last of some pairs gives `[1, hidden]`, all of them on the device.

        Args:
            numbers: position of column 0, the first pair's column, the last one's number, then the pairs' tokens.
            features: `[pairs, hidden]`.
            see: bool `[1, columns]`, which columns the last one sees.
        """
        first, at, last, tokens = numbers.split([1, 1, 1, len(features)])
        made = self.parts.network.rows(self.parts.embed(tokens), features)
        places = at + torch.arange(len(tokens), device=at.device)
        rope = self.parts.network.rope(first + places, features)
        self._write(places, made, rope)
        return self._over(see, Rows(*(_row(part, last) for part in made)), Rope(*(_row(part, last) for part in rope)))

    def _candidates(self, features: Tensor, told: Tensor, *, rows: int) -> tuple[Tensor, ...]:
        """What is recorded of `candidates`, of which there are `rows`."""
        numbers, see = apart(told, 1 + 3 * rows)
        at, tokens, above, positions = numbers.split([1, rows, rows, rows])
        return self.ran_candidates(at, tokens, features[above], positions, see.view(rows, -1))

    def ran_candidates(self, at: Tensor, tokens: Tensor, features: Tensor, positions: Tensor, see: Tensor) -> Drafted:
        """What candidates give at the columns from `at` on, all that is told of them being on the device: `tokens`,
        `positions` `[rows]`, their parents' `features` `[rows, hidden]` and which columns they `see`
        `[rows, columns]`."""
        made = self.parts.network.rows(self.parts.embed(tokens), features)
        rope = self.parts.network.rope(positions, features)
        self._write(at + torch.arange(len(tokens), device=at.device), made, rope)
        return self._over(see, made, rope)

    def _children(self, hidden: Tensor, *, width: int) -> tuple[Tensor, ...]:
        """What is recorded of `children`."""
        return for_host(*self.best_children(hidden, width))

    def best_children(self, hidden: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """The same as `children`, on the device."""
        log_probs, best = best_tokens(self.parts.output(hidden), width)
        known = self.parts.target_ids
        # The sum of a softmax may round to more than 1, a claim must not.
        return log_probs.clamp(max=0.0), best if known is None else known[best]

    def _write(self, places: Tensor, rows: Rows, rope: Rope) -> None:
        for held, new in zip(self._held(), self.parts.network.remember(rows, rope), strict=True):
            held.index_copy_(1, places, new)

    def _over(self, see: Tensor, rows: Rows, rope: Rope) -> Drafted:
        keys, values = (held[:, : see.shape[1]] for held in self._held())
        told: Drafted = self.parts.network(rows, rope, keys, values, see)
        return told

    def _held(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def room(self, like: Tensor, columns: int, few: bool) -> int:
        """How many columns the next forward is shown, `columns` of which may count: few numbers, where it is recorded,
        so that there are few recordings. Makes room for them."""
        shown = shown_columns(columns) if few else columns
        if (room := 0 if self.keys is None else self.keys.shape[1]) < shown:
            self._grow(like, max(shown + SPARE, 2 * room))
        return shown

    def _grow(self, like: Tensor, room: int) -> None:
        """Move to larger memory; nothing that was recorded holds then."""
        old: list[Tensor] = [] if self.keys is None else list(self._held())
        if self.store is not None:
            self.store.forget()
        attention: Any = self.parts.network.layer.self_attn
        with torch.inference_mode(False):  # what was made within could not be written to without
            self.keys, self.values = (like.new_zeros(attention.kv_heads, room, attention.dim) for _ in range(2))
        for mine, theirs in zip(self._held(), old, strict=False):
            mine[:, : theirs.shape[1]] = theirs


def _row(tensor: Tensor, at: Tensor) -> Tensor:
    """Row `at` `[1]`; itself where it is the only one, as what packed layers made of it is known by its identity."""
    return tensor if len(tensor) == 1 else tensor[at]


def _whole(*numbers: Sequence[int] | Ints) -> Ints:
    """All `numbers`, one behind the other, int64."""
    return np.concatenate(numbers).astype(np.int64)
