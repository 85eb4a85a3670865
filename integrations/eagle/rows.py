"""The rows that a draft layer has run for one sequence: its accepted pairs, and below them one step's candidates.

Knows the draft's own KV cache and who sees whom in it. Does not choose tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .borrowed import Parts
from .network import Drafted, Rope, Rows

WAITING = 64  # steps whose hidden states wait to be fused: several at once take hardly longer than one
SPARE = 256  # rows that the cache has room for beyond those it was made for


class DraftRows:
    """Keys and values of accepted pairs, which stay, and of candidates, which the next accepted pair drops.

    Args:
        parts: the head, on its device.
        first: position of the first pair; those before it were in the base's KV cache already.
    """

    def __init__(self, parts: Parts, first: int) -> None:
        self.parts, self.first, self.accepted = parts, first, 0
        # Of accepted positions that were not run yet: features, and of the latest the hidden states to make them of.
        self.features: list[Tensor] = []
        self.pending: list[list[Tensor]] = []
        self.keys: Tensor | None = None  # [kv heads, capacity, head_dim]
        self.values: Tensor | None = None
        self.see = torch.zeros(0, 0, dtype=torch.bool, device=parts.device)  # candidates by candidates

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

        `ids` is the whole sequence; its last token, the root, completes the last pair. Only that row is run in full:
        of a single layer the earlier ones are needed as keys and values alone.
        """
        if self.pending:
            self._fuse()
        features = torch.cat(self.features)
        tokens = torch.tensor(ids[-len(features) :], device=self.parts.device)
        self.features, self.see = [], self.see[:0, :0]
        rows = self.parts.network.rows(self.parts.embed(tokens), features)
        rope = self._rope(torch.arange(self.accepted, self.accepted + len(tokens), device=tokens.device), features)
        keys, values = self._keep(rows, rope, self.accepted)
        self.accepted += len(tokens)
        last: Drafted = self.parts.network(_last(rows), Rope(*map(_tail, rope)), keys, values)
        return last

    def drop(self) -> None:
        """Forget the candidates."""
        self.see = self.see[:0, :0]

    def level(self, tokens: Tensor, features: Tensor, parents: Tensor, depths: Tensor) -> Drafted:
        """Run candidates below the accepted pairs.

        Args:
            tokens: int64 `[rows]`.
            features: `[rows, hidden]`, what their parents gave.
            parents: int64 `[rows]`, the candidate that each hangs from, counted since `accept`; -1 for the root.
            depths: int64 `[rows]`, 1 for children of the root.
        """
        size, new = len(self.see), len(tokens)
        rows = self.parts.network.rows(self.parts.embed(tokens), features)
        rope = self._rope(self.accepted - 1 + depths, features)
        above = torch.cat([self.see, self.see.new_zeros(1, size)])[parents]
        own = torch.cat([above, torch.eye(new, dtype=torch.bool, device=above.device)], dim=1)
        self.see = torch.cat([torch.cat([self.see, self.see.new_zeros(size, new)], dim=1), own])
        keys, values = self._keep(rows, rope, self.accepted + size)
        out: Drafted = self.parts.network(
            rows, rope, keys, values, torch.cat([own.new_ones(new, self.accepted), own], dim=1)
        )
        return out

    def _fuse(self) -> None:
        self.features.append(self.parts.network.fuse([torch.cat(layer) for layer in zip(*self.pending, strict=True)]))
        self.pending = []

    def _rope(self, positions: Tensor, like: Tensor) -> Rope:
        return self.parts.network.rope(self.first + positions, like)

    def _keep(self, rows: Rows, rope: Rope, at: int) -> tuple[Tensor, Tensor]:
        """Put the keys and values of `rows` at columns `at` and after; return those of all columns up to there."""
        keys, values = self.parts.network.remember(rows, rope)
        end = at + keys.shape[1]
        self.keys, self.values = _room(self.keys, keys, end), _room(self.values, values, end)
        self.keys[:, at:end], self.values[:, at:end] = keys, values
        return self.keys[:, :end], self.values[:, :end]


def _room(held: Tensor | None, like: Tensor, columns: int) -> Tensor:
    """`held`, or a copy with at least `columns` columns."""
    if held is not None and held.shape[1] >= columns:
        return held
    made = like.new_empty(
        like.shape[0], max(columns + SPARE, 2 * (0 if held is None else held.shape[1])), like.shape[2]
    )
    if held is not None:
        made[:, : held.shape[1]] = held
    return made


def _last(rows: Rows) -> Rows:
    return Rows(_tail(rows.attended), _tail(rows.residual))


def _tail(tensor: Tensor) -> Tensor:
    """The last row; itself where it is the only one, as what packed layers made of it is known by its identity."""
    return tensor if len(tensor) == 1 else tensor[-1:]
