"""What a draft model has read of one sequence, and looks at guesses of what comes next.

Knows the tokens read, and below the last of them the rows looked at so far. Does not know how a forward is computed,
nor which guesses are worth a look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ppd_compose.cache import commit
from ppd_compose.device import all_on_host, for_host, on_host, tokens_of
from ppd_compose.ensemble import average, ensemble_parents
from ppd_compose.replayed import Replayed
from ppd_compose.top import best_tokens
from ppd_compose.tree import Floats, Ints

from .forwards import Forwards, Lend, Words

# Row -1 is the last token read; rows 0, 1, ... were looked at since, in that order.
ROOT = -1
NONE: Ints = np.zeros(0, np.int64)  # of prompt tokens


@dataclass(frozen=True)
class Ahead:
    """What a draft model expects after some rows: of each row the next token, the one after it and so on, every one
    guessed on its own, the best first."""

    tokens: Ints  # [rows, distances, width]
    log_probs: Floats  # [rows, distances, width]


class Reading:
    """A draft model on one sequence.

    Args:
        model: the draft model, on any device, in any dtype.
        prompts: prompt tokens `[n, v, hidden]`; `n` may be 0.
        vocab_size: tokens that may be guessed; the model's own vocabulary may be larger.
        width: guesses of each next token.
        prefix: keys and values that prompt tokens alone see before the sequence `[layers that keep the whole context,
            2, key heads, columns, head_dim]`.
        lend: where forwards are recorded, see `Forwards`.
        searching: `best_guesses`, of no other sequence meanwhile; None: it is launched.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Tensor,
        vocab_size: int,
        width: int,
        prefix: Tensor | None = None,
        lend: Lend | None = None,
        searching: Replayed | None = None,
    ) -> None:
        self.forward = Forwards(model, prompts.flatten(0, 1), prefix, lend)
        (self.n, self.v), self.vocab_size, self.width = prompts.shape[:2], vocab_size, width
        self.searching = searching or Replayed(best_guesses, model.device, None)
        self.length = 0  # tokens read
        self.parents: list[int] = []  # of the rows looked at
        self.rows: dict[tuple[int, int], int] = {}  # (parent, token): the row that holds it

    @property
    def at_once(self) -> bool:
        """Whether the host would wait for each forward."""
        return self.forward.lend is not None or self.forward.model.device.type != "cpu"

    @property
    def cache(self) -> Cache:
        """The draft model's keys and values."""
        return self.forward.cache

    def read(self, ids: Sequence[int], prompts: int) -> Ahead:
        """Read the tokens of `ids` that are new; those that were looked at as guesses need no second forward.

        Returns what is expected after the last token, by itself and by up to `prompts` prompt tokens below it:
        `[1, 1 + prompts, width]`.
        """
        return self._read(self._begun(ids), prompts)

    @torch.no_grad()
    def chain(self, ids: Sequence[int], looks: int) -> list[Ahead]:
        """Read as `read` does, and look at the likeliest token after that, then at the likeliest after this one, and so
        on: `looks` forwards, of which none waits for the one before to tell the host.

        Returns what is expected after the last token read, and after each looked at: `[1, 1, width]`.
        """
        tokens: Words = self._begun(ids)
        above, told = range(ROOT, len(tokens) - 1), []
        self.length, begin = self.length + len(tokens), self.length
        for look in range(looks):
            told.append(self._searched(self.forward(begin, tokens, NONE, above, 1), 1))
            tokens, above, begin = tokens_of(*told[-1])[0, :1], range(ROOT, look), self.length
        ahead = [_ahead(*each, 1) for each in all_on_host(told)]
        for row, before in enumerate(ahead[:-1]):
            self.rows[row - 1, int(before.tokens[0, 0, 0])] = row
        self.parents = list(range(ROOT, looks - 2))
        return ahead

    def _begun(self, ids: Sequence[int]) -> Sequence[int]:
        """Those of `ids` that are new, but for what is read in forwards of its own."""
        self._settle(ids)
        if self.length:
            self.forward.lie_still()
        while len(ids) - self.length > self.forward.most:
            self._read(ids[self.length : self.length + self.forward.most], 0)
        return ids[self.length :]

    def look(self, tokens: Sequence[int], parents: Sequence[int], prompts: int) -> Ahead:
        """Look at guesses: row i holds `tokens[i]` and stands below row `parents[i]`, looked at before or now.

        Returns what is expected after each of them `[rows, 1 + prompts, width]`, as `read` does.
        """
        ahead = self._forward(tokens, parents, len(tokens), prompts)
        for token, parent in zip(tokens, parents, strict=True):
            self.rows[parent, token] = len(self.parents)
            self.parents.append(parent)
        return ahead

    def _settle(self, ids: Sequence[int]) -> None:
        """Take the rows that `ids` holds for read, but not its last token, and drop all others."""
        path: list[int] = []
        for token in ids[self.length : -1]:
            row = self.rows.get((path[-1] if path else ROOT, token))
            if row is None:
                break
            path.append(row)
        commit(self.cache, len(self.parents), path)
        self.length += len(path)
        self.parents, self.rows = [], {}

    def _read(self, tokens: Sequence[int], prompts: int) -> Ahead:
        ahead = self._forward(tokens, range(ROOT, len(tokens) - 1), 1, prompts)
        self.length += len(tokens)
        return ahead

    @torch.no_grad()
    def _forward(self, tokens: Sequence[int], parents: Sequence[int], last: int, prompts: int) -> Ahead:
        """One forward of new rows and, below each of the `last` ones, of prompt tokens, whose rows leave the
        cache again."""
        n = min(prompts, self.n)
        rows = len(self.parents) + len(tokens)
        below = ensemble_parents(np.arange(rows - last, rows), rows, n, self.v).ravel().tolist()
        kinds = np.tile(np.arange(n * self.v), last)
        above = [*self.parents, *parents, *below]
        logits = self.forward(self.length, tokens, kinds, above, last + len(below))
        commit(self.cache, len(below), [])
        return _ahead(*on_host(*self._searched(logits, last)), last)

    def _searched(self, logits: Tensor, last: int) -> tuple[Tensor, ...]:
        """`best_guesses` of `logits`."""
        return self.searching(logits, last=last, v=self.v, vocab=self.vocab_size, width=self.width)


def best_guesses(logits: Tensor, *, last: int, v: int, vocab: int, width: int) -> tuple[Tensor, ...]:
    """Log-probabilities and tokens `[last + last * n, width]`, `for_host`: of rows, then of their prompt tokens.

    Args:
        logits: `[last + last * n * v, entries]`, of which the first `vocab` may be guessed.
        last: rows.
        v: embeddings of a prompt token, which are averaged.
        vocab: entries that may be guessed.
        width: guesses of each.
    """
    logits = logits[:, :vocab].float()
    if v > 1 and len(logits) > last:
        logits = torch.cat([logits[:last], average(logits[last:].unflatten(0, (-1, v)), 1)])
    return for_host(*best_tokens(logits, width))


def _ahead(claims: NDArray[np.float32], best: Ints, rows: int) -> Ahead:
    """What was told of `rows` rows, then of their prompt tokens, `[rows + rows * n, width]`."""
    return Ahead(_by_row(best, rows), _by_row(claims, rows).astype(np.float64))


def _by_row(best: Any, rows: int) -> Any:
    """`[rows, 1 + n, width]` from `[rows + rows * n, width]`."""
    return np.concatenate([best[:rows, None], best[rows:].reshape(rows, -1, best.shape[1])], axis=1)
