"""Layers of a KV cache into whose memory a forward writes, and how much of that memory counts.

Knows memory, columns in front of the context, and those that have left a sliding window. Does not know the cache, nor
who sees what.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer

ROOM = 128  # tokens by which the memory grows


@dataclass(eq=False)
class Extent:
    """How many columns the layers of a cache hold; what stands behind them is written over."""

    columns: int
    front: int = 0  # of them, before those of the context
    hidden: int = 0  # of the first ones, kept from the next forward
    everywhere: bool = False  # whether all layers of the cache have this one
    window: int | None = None  # how many tokens a row sees, itself included; None: all
    gone: int = 0  # tokens that were dropped, as they had left the window

    @property
    def tokens(self) -> int:
        """How many there are, with those that are gone and with columns in front."""
        return self.columns + self.gone

    @property
    def stale(self) -> int:
        """Columns that have left the window: no row of a next forward sees them."""
        return 0 if self.window is None else max(self.columns - self.front - self.window + 1, 0)

    def slid(self) -> Extent:
        """The same without what is stale."""
        return replace(self, columns=self.columns - self.stale, gone=self.gone + self.stale)


class InPlaceLayer(DynamicLayer):
    """Stands in for a layer of transformers: `keys` and `values`, `[batch, heads, room, head_dim]`, are longer than
    what they hold, so that a forward's own fit in behind."""

    spare = 0  # columns of its memory beyond what it asks for
    both: Tensor | None = None  # keys and values `[2, batch, heads, room, head_dim]`, where they lie in one memory

    def __init__(self, layer: Any, extent: Extent) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer, self.extent = layer, extent
        self.keys, self.values, self.is_initialized = layer.keys, layer.values, True
        self.front = 0  # columns of its memory before those of the context

    @property
    def room(self) -> int:
        """Columns that its memory has."""
        keys: Any = self.keys
        return int(keys.shape[-2])

    @property
    def tensors(self) -> list[Tensor]:
        """What its keys and values lie in, as few tensors as may be, `[..., room, head_dim]`."""
        apart: list[Any] = [self.keys, self.values]
        return apart if self.both is None else [self.both]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write them behind what counts, for which `make_room` has been called; all there is then but what is hidden,
        `[..., columns, _]`.

        They count when `count` is told: a compiled forward changes tensors and nothing else.
        """
        keys: Any = self.keys
        values: Any = self.values
        begin, hidden = self.extent.columns, self.extent.hidden
        end = begin + key_states.shape[-2]
        keys[:, :, begin:end] = key_states
        values[:, :, begin:end] = value_states
        return keys[:, :, hidden:end], values[:, :, hidden:end]

    def get_seq_length(self) -> int:
        """Columns that a forward sees before its own."""
        return self.extent.columns - self.extent.hidden

    def grow(self, rows: int) -> None:
        """Let there be room for `rows` more."""
        needed = self.extent.columns + rows
        more = ROOM * -(-needed // ROOM) + self.spare - self.room
        self._take(_longer(self.keys, self.values, more))

    def give_back(self) -> Any:
        """The layer that this one stands in for, with what counts of the context."""
        held: list[Any] = [self.keys, self.values]
        tokens = self.extent.columns - self.extent.front
        self.layer.keys, self.layer.values = (states.narrow(-2, self.front, tokens) for states in held)
        return self.layer

    def refill(self, held: Mapping[str, Tensor], front: int) -> None:
        """Hold copies of what counts of the keys and values `held`, of all tokens behind `front` columns more."""
        self._take({name: states.clone() for name, states in held.items()})

    def move_behind(self, keys: Tensor, values: Tensor) -> None:
        """Let `keys` and `values` `[heads, columns, head_dim]` stand before the context."""
        columns = keys.shape[-2]
        states = _longer(self.keys, self.values, 0, columns)
        for name, front in {"keys": keys, "values": values}.items():
            states[name][..., :columns, :] = front
        self._take(states, front=self.front + columns)

    def _take(self, states: Mapping[str, Tensor], **more: Any) -> None:
        """Hold these keys and values from now on."""
        vars(self).update({"both": None, **states, **more})  # at once: a call may be broken off anywhere
        self.layer.keys, self.layer.values = self.keys, self.values  # so that the old memory is free


class WindowLayer(InPlaceLayer):
    """Stands in for a layer with a sliding window. Columns that have left it stay until their room is needed.

    One column more stands in front of all and is seen by none, and its memory has one more: a graph that is compiled
    while no token has left would else take the numbers of columns here and in layers that keep the whole context to be
    the same for ever.
    """

    is_sliding = True
    spare = 1

    def __init__(self, layer: Any, extent: Extent) -> None:
        super().__init__(layer, extent)
        self.sliding_window = layer.sliding_window
        self.keys, self.values = (pad(states, (0, 0, extent.front, 0)) for states in (layer.keys, layer.values))

    def get_seq_length(self) -> int:
        """Tokens before those of a forward, whether or not they are held."""
        return self.extent.tokens - self.extent.front

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a forward of `query_length` rows sees, and the token that stands in the first of them."""
        seen = self.extent.columns - self.extent.hidden + query_length
        return seen, self.get_seq_length() + query_length - seen

    def slide(self, extent: Extent, rows: int) -> None:
        """Drop columns that have left the window, so that those of `extent` are held, and let there be room for `rows`
        more."""
        held: list[Any] = [self.keys, self.values]
        stale = self.extent.columns - extent.columns
        keys, values = (old.narrow(-2, stale, extent.columns) for old in held)
        self._take(_longer(keys, values, max(rows, ROOM)), extent=extent)

    def refill(self, held: Mapping[str, Tensor], front: int) -> None:
        """The same, of those that are in the window."""
        tokens = held["keys"].shape[-2] - front
        kept = min(tokens, self.sliding_window - 1)
        states = {name: pad(old[..., front + tokens - kept :, :], (0, 0, 1, 0)) for name, old in held.items()}
        self._take(states, extent=Extent(kept + 1, front=1, window=self.sliding_window, gone=tokens - kept))

    def give_back(self) -> Any:
        """The layer that this one stands in for, with what counts of its window, as it keeps it."""
        held: Any = {"keys": self.keys, "values": self.values}
        tokens, first = self.get_seq_length(), self.extent.front + self.extent.stale
        states = {name: old.narrow(-2, first, self.extent.columns - first) for name, old in held.items()}
        vars(self.layer).update(states, cumulative_length=tokens)
        return self.layer


def _longer(keys: Any, values: Any, more: int, before: int = 0) -> dict[str, Tensor]:
    """`keys` and `values` with room for `more` columns behind, which nobody has touched yet, so that they take no
    memory, and for others `before`. Those of one shape lie in one memory: a row moves in both at once, and a compiled
    graph, which tells such from others, finds them as they were."""
    if keys.shape != values.shape:
        return {name: _roomier([held], more, before)[0] for name, held in {"keys": keys, "values": values}.items()}
    both = _roomier([keys, values], more, before)
    return {"both": both, "keys": both[0], "values": both[1]}


def _roomier(states: Sequence[Tensor], more: int, before: int) -> Tensor:
    """All `states` in one tensor, each with room for `more` columns behind and for others `before`."""
    *outer, columns, size = states[0].shape
    roomier = states[0].new_empty(len(states), *outer, before + columns + more, size)
    for place, held in zip(roomier, states, strict=True):
        place[..., before : before + columns, :] = held
    return roomier
