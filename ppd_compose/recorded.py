"""Forwards of a few sizes, recorded once each and played again: on a GPU launching a small model's forward takes longer
than computing it.

Knows sizes and what a recording reads. Does not know trees, or how a device records.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from .built import PLAIN, Same, hooks_of, taken_for_given
from .cache import with_cache
from .device import apart, in_one, sent, waits_by_itself
from .fixed import Memory
from .mask import Attention
from .reached import End, end_of
from .recorders import RECORDERS, Recorder, recorders_of
from .replayed import Lendings, RecordingStore
from .tree import Bools, Ints

FEWEST, MANY = 2, 64  # rows: powers of two from the one to the other, beyond that its multiples
BLOCK = 256  # columns that a forward sees beyond those that count, at most, or a quarter


def can_record(model: Any) -> bool:
    """Whether all that `model` computes is launched on one device that can be told the same again."""
    if model.device.type not in RECORDERS:
        return False
    devices = {parameter.device for parameter in model.parameters()}
    return len(devices) == 1 and not any(map(hooks_of, model.modules()))


def recorded_rows(rows: int) -> int:
    """Rows of the forward that takes `rows` of them."""
    return max(FEWEST, 1 << (rows - 1).bit_length()) if rows <= MANY else MANY * -(-rows // MANY)


# Where sizes begin and end.
STEPS = tuple(n for n in range(1, MANY + 1) if n == 1 or n == recorded_rows(n) or recorded_rows(n - 1) < n)


def shown_columns(columns: int) -> int:
    """Columns that a forward sees of which `columns` count: few numbers, so that there are few recordings."""
    block = max(BLOCK, 1 << max((columns - 1).bit_length() - 3, 0))
    return block * -(-columns // block)


@dataclass
class Inputs:
    """What a forward is given anew each time beside keys and values, in one copy to the device."""

    told: Tensor  # numbers and flags as bytes, one behind the other
    begin: int  # columns that all rows see, but for those in front
    rows: int
    own: int  # columns behind these, each seen by some rows; the last of them are the rows' own
    front: int  # columns before all others, each seen by some rows
    nodes: int  # the first rows, of which an accepted path is looked for; 0: there is none to look for

    @classmethod
    def of(cls, begin: int, words: Ints, positions: Ints, see: Bools, front: Bools, nodes: int = 0) -> Inputs:
        """On the host.

        Args:
            begin: columns that all rows see but for those in front.
            words: of each row its token or kind of embedding.
            positions: of each row.
            see: `[rows, own]`, which of the columns behind them it sees, the last of which are the rows' own.
            front: `[rows, front]`, which columns in front.
            nodes: how many rows are a tree's, the first.
        """
        rows, own = see.shape
        numbers = np.concatenate([[begin], words, positions, [nodes]]).astype(np.int64)
        return cls(in_one(numbers, see, front), begin, rows, own, front.shape[1], nodes)

    def on(self, told: Tensor) -> Inputs:
        """The same, held by `told`."""
        return replace(self, told=told)

    def there(self, device: torch.device) -> Inputs:
        """The same on `device`."""
        return self.on(sent(self.told, device))

    @property
    def columns(self) -> int:
        """How many are there with the rows' own."""
        return self.begin + self.own

    @property
    def words(self) -> Tensor:
        """Of each row its token or kind of embedding `[rows]`, on the device."""
        return apart(self.told, 1 + self.rows)[0][1:]

    def parts(self) -> tuple[Tensor, ...]:
        """The arguments of `of`, on the device, but for `nodes`."""
        n = self.rows
        numbers, flags = apart(self.told, 2 + 2 * n)
        see, front = flags.split([n * self.own, n * self.front])
        return (*numbers[:-1].split([1, n, n]), see.view(n, self.own), front.view(n, self.front))

    def end(self, logits: Tensor) -> End | None:
        """Where the path ends that follows the likeliest tokens by `logits` `[rows, vocab]`, on the device."""
        if not self.nodes:
            return None
        see, nodes = self.parts()[3][:, self.own - self.rows :], apart(self.told, 2 + 2 * self.rows)[0][-1:]
        return end_of(self.words, nodes, see, logits.argmax(-1))


class Outputs(NamedTuple):
    """What a recorded forward leaves for its caller; nothing else of it is held."""

    logits: Tensor  # [1, rows, vocab]
    hidden_states: tuple[Tensor, ...] | None  # by layer [1, rows, hidden], where asked for
    end: End | None  # of the path that follows the likeliest tokens, where one is looked for


@dataclass
class RecordedForward:
    """A forward of fixed size over one memory: the tensors that it reads, and what plays it."""

    inputs: Inputs
    embeddings: Tensor  # [1, rows, hidden]
    play: Callable[[], Outputs]


class FixedMemories:
    """The memories that stay, over which forwards of one composition are recorded; a sequence has one to itself."""

    def __init__(self) -> None:
        self.lendings: Lendings[Memory] = Lendings()

    @contextmanager
    def lent(self, model: Any, cache: Cache, visible: Tensor, given_back: bool = True) -> Iterator[None]:
        """Within, the layers of `cache`, which are all written in place, lie in a memory that stays.

        Args:
            visible: bool `[tokens]`, which of those that are cached are no padding.
            given_back: whether somebody reads `cache` afterwards.
        """
        lending = self.lendings.of(
            model, taken_for_given(model), lambda: partial(_memory, recorders_of(model.device), type(model))
        )
        with lending.lent() as memory:
            try:
                memory.take_in(cache, visible)
                yield
            finally:
                try:
                    if given_back:
                        memory.give_back(cache)
                finally:
                    memory.cache = None


def _memory(make_recorder: Callable[[], Recorder], kind: type) -> Memory:
    return Memory(RecordingStore(make_recorder, f"forwards of {kind.__name__}"))


def play(
    model: Any,
    memory: Memory,
    inputs: Inputs,
    embed: Callable[[Tensor], Tensor],
    wanted: Mapping[str, Any],
) -> Outputs:
    """What `model` says of the rows of `inputs`, in tensors that the next forward of their number writes over.

    Args:
        embed: gives the rows' embeddings `[1, rows, hidden]` for their words `[rows]`.
        wanted: more keyword arguments of the forward.
    """
    sizes = inputs.rows, inputs.own, inputs.front, shown_columns(inputs.columns), inputs.nodes > 0
    key = *sizes, *((name, _fixed(wanted[name])) for name in sorted(wanted))
    recording = memory.store.kept(key, partial(_made, model, memory, inputs, embed, wanted))
    recording.inputs.told.copy_(inputs.told, non_blocking=waits_by_itself(model.device))
    recording.embeddings.copy_(embed(recording.inputs.words))
    return recording.play()


def _made(
    model: Any, memory: Memory, inputs: Inputs, embed: Callable[[Tensor], Tensor], wanted: Mapping[str, Any]
) -> RecordedForward:
    """The forward of the size of `inputs`, recorded."""
    now = inputs.there(model.device)
    embeddings = embed(now.words)
    with torch.inference_mode(False):  # what was made within could not be written to without
        mine, held = inputs.on(torch.empty_like(now.told)), torch.empty_like(embeddings)
    mine.told.copy_(now.told)
    held.copy_(embeddings)
    run = partial(_forward, model, memory, mine, held, shown_columns(inputs.columns), wanted)
    return RecordedForward(mine, held, memory.store.player(run))


def _forward(
    model: Any, memory: Memory, inputs: Inputs, embeddings: Tensor, columns: int, wanted: Mapping[str, Any]
) -> Outputs:
    """What is recorded: it reads tensors that stay and nothing else, and sees `columns` columns, those hidden that do
    not count."""
    begin, _, positions, *_ = inputs.parts()
    positions = positions.clone()  # of a view a compiled graph takes the place where it begins for one of the sizes
    memory.seen = columns
    memory.places = begin + torch.arange(inputs.own - inputs.rows, inputs.own, device=begin.device)
    out = model(
        inputs_embeds=embeddings,
        attention_mask=Attention.of(model).masks(_seen_by(memory, inputs, columns)),
        position_ids=positions[None],
        **with_cache(model, memory.cache),
        return_dict=True,
        **wanted,
    )
    return Outputs(out.logits, out.hidden_states, inputs.end(out.logits[0]))


def _seen_by(memory: Memory, inputs: Inputs, columns: int) -> dict[int | None, Tensor]:
    """Which columns the rows see in layers of each window `[1, 1, rows, columns]`; with one none of those in front."""
    begin, _, _, see, front = inputs.parts()
    at = torch.arange(columns, device=begin.device) - begin  # which of those behind what all see
    inside, own = (at >= 0) & (at < inputs.own), at.clamp(0, inputs.own - 1)
    mine = see.gather(1, own.expand(inputs.rows, -1)) & inside
    before = (memory.visible[:columns] & (at < 0)).expand(inputs.rows, -1)[:, inputs.front :]
    seen_by: dict[int | None, Tensor] = {}
    for window in memory.windows:
        if window is None:
            seen_by[None] = (torch.cat([front, before], dim=1) | mine)[None, None]
        else:  # there all columns behind what all see are the rows' own, and stand as deep as these
            depths = see.sum(1) - 1
            near = depths[:, None] - torch.where(inside, depths[own], at) < window
            seen_by[window] = ((torch.cat([torch.zeros_like(front), before], dim=1) | mine) & near)[None, None]
    return seen_by


def _fixed(value: Any) -> Hashable:
    """What a recording takes for given of a keyword argument."""
    if isinstance(value, list | tuple):
        return tuple(map(_fixed, value))
    return value if isinstance(value, PLAIN) else Same(value)
