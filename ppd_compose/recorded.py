"""Forwards of a few sizes, recorded once each and played again: on a GPU launching a small model's forward takes longer
than computing it.

Knows sizes, what a recording reads, and CUDA graphs. Does not know trees.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from .cache import with_cache
from .compiled import PLAIN, Same, taken_for_given
from .fixed import Memory
from .mask import attention_mask
from .tree import Bools, Ints

FEWEST, MANY = 2, 64  # rows: powers of two from the one to the other, beyond that its multiples
BLOCK = 256  # columns that a forward sees beyond those that count, at most, or a quarter
WARM = 3  # forwards before one is recorded: kernels are chosen and compiled meanwhile

Recorder = Callable[[Callable[[], Any]], Callable[[], Any]]


class CudaGraphs:
    """Recorder of what a CUDA device is told: gives back what plays it again into the same tensors.

    All graphs of one recorder share their memory, as only one at a time is played and what it gave is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool: Any = None

    def __call__(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Record `run`, which may read and write nothing but tensors that stay, and never wait for the device."""
        with torch.cuda.device(self.device):
            now, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(now)
            with torch.cuda.stream(aside):
                for _ in range(WARM):
                    run()
            now.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                out = run()
        self.pool = graph.pool()

        def play() -> Any:
            graph.replay()
            return out

        return play


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaGraphs}  # by kind of device


def padded(rows: int) -> int:
    """Rows of the forward that takes `rows` of them."""
    return max(FEWEST, 1 << (rows - 1).bit_length()) if rows <= MANY else MANY * -(-rows // MANY)


def seen(columns: int) -> int:
    """Columns that a forward sees of which `columns` count: few numbers, so that there are few recordings."""
    block = max(BLOCK, 1 << max((columns - 1).bit_length() - 3, 0))
    return block * -(-columns // block)


@dataclass
class Told:
    """What a forward of fixed size is told anew each time: whole numbers, in one copy to the device."""

    numbers: Tensor  # int64, all of them, one behind the other
    begin: int  # how many columns counted when it was made
    rows: int
    front: int

    @classmethod
    def of(cls, begin: int, words: Ints, positions: Ints, see: Bools, front: Bools) -> Told:
        """On the host: how many columns count, and of each row its token or kind of embedding and its position, which
        rows it sees `[rows, rows]` and which columns in front `[rows, front]`."""
        numbers = np.concatenate([[begin], words, positions, see.ravel(), front.ravel()]).astype(np.int64)
        return cls(torch.from_numpy(numbers), begin, len(words), front.shape[1])

    def on(self, numbers: Tensor) -> Told:
        """The same, held by `numbers`."""
        return replace(self, numbers=numbers)

    @property
    def words(self) -> Tensor:
        """Of each row its token or kind of embedding `[rows]`, on the device."""
        return self.numbers[1 : 1 + self.rows]

    def parts(self) -> tuple[Tensor, ...]:
        """The arguments of `of`, on the device; the two last ones as bool."""
        n = self.rows
        *flat, see, front = self.numbers.split([1, n, n, n * n, n * self.front])
        return (*flat, see.view(n, n).bool(), front.view(n, self.front).bool())


@dataclass
class Recording:
    """A forward of fixed size over one memory: the tensors that it reads, and what plays it."""

    told: Told
    embeddings: Tensor  # [1, rows, hidden]
    play: Callable[[], Any]


class Recordings:
    """The forwards of one composition that were recorded, each over a memory that stays."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.free: list[Memory] = []  # of no generation at the moment

    @contextmanager
    def lent(self, model: Any, cache: Cache, visible: Tensor) -> Iterator[None]:
        """Within, the layers of `cache`, which are all written in place, lie in a memory that stays.

        Args:
            visible: bool `[tokens]`, which of those that are cached are no padding.
        """
        memory = self._memory(taken_for_given(model))
        try:
            memory.take_in(cache, visible)
            yield
        finally:
            memory.give_back(cache)
            self.free.append(memory)

    def _memory(self, facts: Hashable) -> Memory:
        """One that is free, where what was recorded still holds; of those for which it does not one is dropped."""
        with suppress(IndexError):  # and not by asking before: another thread may take the last one
            if (memory := self.free.pop()).facts == facts:
                return memory
        return Memory(RECORDERS[self.device.type](self.device), facts)


def play(
    model: Any,
    memory: Memory,
    told: Told,
    embed: Callable[[Tensor], Tensor],
    wanted: Mapping[str, Any],
) -> Any:
    """What `model` says of the rows of `told`, in tensors that the next forward of their number writes over.

    Args:
        embed: gives the rows' embeddings `[1, rows, hidden]` for their words `[rows]`.
        wanted: more keyword arguments of the forward.
    """
    key = told.rows, told.front, seen(told.begin + told.rows), *((k, _fixed(wanted[k])) for k in sorted(wanted))
    recording = memory.recordings.get(key)
    if recording is None:
        recording = memory.recordings[key] = _recorded(model, memory, told, embed, wanted)
    recording.told.numbers.copy_(told.numbers, non_blocking=True)
    recording.embeddings.copy_(embed(recording.told.words))
    return recording.play()


def _recorded(
    model: Any, memory: Memory, told: Told, embed: Callable[[Tensor], Tensor], wanted: Mapping[str, Any]
) -> Recording:
    """The forward of the size of `told`, recorded; where that cannot be done it is computed anew each time."""
    mine = told.on(told.numbers.to(model.device, copy=True))
    embeddings, columns = embed(mine.words).clone(), seen(told.begin + told.rows)
    run = partial(_forward, model, memory, mine, embeddings, columns, wanted)
    try:
        return Recording(mine, embeddings, memory.recorder(run))
    except RuntimeError as error:
        warnings.warn(
            f"forwards of {type(model).__name__} cannot be recorded, so each is launched anew: {error}", stacklevel=2
        )
        return Recording(mine, embeddings, run)


def _forward(
    model: Any, memory: Memory, told: Told, embeddings: Tensor, columns: int, wanted: Mapping[str, Any]
) -> Any:
    """What is recorded: it reads tensors that stay and nothing else, and sees `columns` columns, those hidden that do
    not count."""
    begin, _, positions, see, front = told.parts()
    own = torch.arange(told.rows, device=begin.device)
    memory.places, memory.seen = begin + own, columns
    at = torch.arange(columns, device=begin.device) - begin  # which of the rows' own columns
    mine = see.gather(1, at.clamp(0, told.rows - 1).expand(told.rows, -1)) & (at >= 0) & (at < told.rows)
    before = (memory.visible[:columns] & (at < 0)).expand(told.rows, -1)
    before = torch.cat([front, before[:, told.front :]], dim=1)
    return model(
        inputs_embeds=embeddings,
        attention_mask=attention_mask(model, (before | mine)[None, None]),
        position_ids=positions[None],
        **with_cache(model, memory.cache),
        return_dict=True,
        **wanted,
    )


def _fixed(value: Any) -> Hashable:
    """What a recording takes for given of a keyword argument."""
    if isinstance(value, list | tuple):
        return tuple(map(_fixed, value))
    return value if isinstance(value, PLAIN) else Same(value)
