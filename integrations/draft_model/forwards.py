"""Forwards of a draft model over what it has read and the guesses below: launched, or recorded and played again.

Knows its KV cache, positions and masks. Does not know which guesses are worth a look, nor what is said of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from ppd_compose.cache import with_cache
from ppd_compose.fixed import memory_of
from ppd_compose.inplace import count, counted, lay_in_place
from ppd_compose.lineage import ancestors
from ppd_compose.mask import Attention, unplanned
from ppd_compose.recorded import MANY, Inputs, play, recorded_rows
from ppd_compose.tree import Ints

CHUNK = 512  # tokens of a prompt that are read in one forward

Lend = Callable[[Cache, Tensor], None]
Words = Sequence[int] | Tensor


class Forwards:
    """A draft model on one sequence.

    Args:
        model: the draft model, on any device, in any dtype.
        prompts: prompt tokens `[n * v, hidden]`.
        prefix: keys and values that prompt tokens alone see before the sequence `[layers that keep the whole context,
            2, key heads, columns, head_dim]`.
        lend: lays a KV cache, of which the columns `bool [columns]` are visible, into memory over which forwards are
            recorded; None: they are launched.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: Tensor, prefix: Tensor | None = None, lend: Lend | None = None
    ) -> None:
        self.model, self.prompts = model, prompts
        # Layers that keep the whole past, also where the model has windows, which the masks cut instead: a window's own
        # layer forgets what it holds while guesses are looked at, and they are dropped again.
        self.cache = DynamicCache()
        layers: list[Any] = list(DynamicCache(config=model.config).layers)
        self.windows = {layer.sliding_window if layer.is_sliding else None for layer in layers}
        self.front = 0 if prefix is None else prefix.shape[3]  # columns before the sequence
        if prefix is not None:
            whole = [at for at, layer in enumerate(layers) if not layer.is_sliding]
            for at, states in zip(whole, prefix.to(model.device, model.dtype), strict=True):
                self.cache.update(*states[:, None], at)
        self.positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.lend = lend if self.windows == {None} else None

    @property
    def most(self) -> int:
        """Tokens that are read in one forward, at most: what is recorded is of few sizes."""
        return CHUNK if memory_of(self.cache) is None else MANY

    def __call__(self, length: int, tokens: Words, kinds: Ints, parents: Sequence[int], last: int) -> Tensor:
        """Logits `[last, vocab]` of the `last` ones of new rows, behind `length` tokens that were read.

        Args:
            length: columns behind those in front that all rows see; behind them stand guesses looked at before.
            tokens: of new rows; on the device where the host does not know them yet.
            kinds: of the rows behind these, which of the prompt tokens' embeddings they carry.
            parents: of the guesses looked at before, and of all new rows; -1 is the last token that was read.
        """
        above = np.asarray(parents, np.int64)
        if memory_of(self.cache) is None:
            return self._launched(length, tokens, kinds, above, last)
        return self._played(length, tokens, kinds, above)[-last:]

    def lie_still(self) -> None:
        """Let the KV cache, which holds tokens and no guesses now, lie where forwards are recorded, if any are."""
        if self.lend is None or memory_of(self.cache) is not None:
            return
        layers: list[Any] = list(self.cache.layers)
        if len({layer.get_seq_length() for layer in layers}) == 1:  # but in models that pass layers by
            lay_in_place(self.cache)
            self.lend(self.cache, torch.ones(counted(self.cache), dtype=torch.bool, device="cpu"))

    def _launched(self, length: int, tokens: Words, kinds: Ints, parents: Ints, last: int) -> Tensor:
        model: Any = self.model
        # A mere chain needs no mask where nothing stands before the sequence.
        plain = not self.front and np.array_equal(parents, np.arange(-1, len(parents) - 1))
        known = _known(tokens)
        told = self._chain(length, [*known, *kinds], parents) if plain else self._told(length, known, kinds, parents)
        _, words, at, see, front = told.there(model.device).parts()
        parts = _apart(words, tokens, [len(kinds)])
        given = {"inputs_embeds": self._embedded(*parts)} if len(kinds) else {"input_ids": parts[0][None]}
        mask = {} if plain else {"attention_mask": self._mask(length, see, front)}
        keep: dict[str, Any] = {"logits_to_keep": last} if self._keeps_logits else {}
        with unplanned(model.device):
            out = model(
                **given, **mask, **keep, position_ids=at[None], **with_cache(model, self.cache), return_dict=True
            )
        logits: Tensor = out.logits[0, -last:]
        return logits

    def _played(self, length: int, tokens: Words, kinds: Ints, parents: Ints) -> Tensor:
        """Logits of all rows by what was recorded."""
        memory: Any = memory_of(self.cache)
        rows = len(tokens) + len(kinds)
        idle = recorded_rows(rows) - rows
        memory.make_room(rows + idle)
        inputs = self._told(length, _known(tokens), kinds, parents, idle)
        behind = [len(kinds), idle]
        outputs = play(self.model, memory, inputs, lambda words: self._embedded(*_apart(words, tokens, behind)), {})
        count(self.cache, rows)
        return outputs.logits[0, :rows]

    def _chain(self, length: int, words: Sequence[int], parents: Ints) -> Inputs:
        """What a forward is given of new rows that see all before them, which nobody needs to be told."""
        at, nobody = self._standing(length, 1 + parents[len(parents) - len(words) :]), np.zeros((len(words), 0), bool)
        return Inputs.of(self.front + length, np.asarray(words, np.int64), at, nobody, nobody)

    def _told(self, length: int, tokens: Sequence[int], kinds: Ints, parents: Ints, idle: int = 0) -> Inputs:
        """The same of any new rows, and of `idle` ones that mean nothing."""
        end = len(tokens) + len(kinds)
        see = ancestors(np.concatenate([parents, np.full(idle, -1)]))[len(parents) - end :]
        front = np.zeros((len(see), self.front), bool)
        front[len(tokens) : end] = True
        words = np.concatenate([tokens, kinds, np.zeros(idle, int)])
        return Inputs.of(self.front + length, words, self._standing(length, see.sum(1) - 1), see, front)

    def _embedded(self, tokens: Tensor, kinds: Tensor, idle: Tensor | None = None) -> Tensor:
        embed: Tensor = self.model.get_input_embeddings()(tokens)
        own = self.prompts[kinds].to(embed)
        return torch.cat([embed, own, embed.new_zeros(0 if idle is None else len(idle), embed.shape[1])])[None]

    def _mask(self, length: int, own: Tensor, front: Tensor) -> Any:
        """Who sees whom in layers of each window, behind `length` columns that all see; with one none in front.

        Args:
            own: bool `[rows, columns]`, of the columns behind those.
            front: bool `[rows, columns]`, of those before all.
        """
        see = torch.cat([own.new_ones(len(own), length), own], dim=1)
        return self._attention.masks(
            {
                window: (torch.cat([front, see], dim=1) if window is None else _last(see, window))[None, None]
                for window in self.windows
            }
        )

    def _standing(self, length: int, depths: Ints) -> Ints:
        """Positions of rows at `depths` behind the tokens read."""
        # Prompt tokens behind the last position guess tokens that there is no room for: any position will do.
        at: Ints = length + depths
        return at if self.positions is None else at.clip(max=self.positions - 1)

    @cached_property
    def _attention(self) -> Attention:
        return Attention.of(self.model)

    @cached_property
    def _keeps_logits(self) -> bool:
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters


def _last(see: Tensor, count: int) -> Tensor:
    """Of the columns that each row sees, bool `[rows, columns]`, the last `count`."""
    return see & (see.flip(1).cumsum(1).flip(1) <= count)


def _known(tokens: Words) -> Sequence[int]:
    """What the host says of them: where it knows none, anything."""
    return [0] * len(tokens) if isinstance(tokens, Tensor) else tokens


def _apart(words: Tensor, tokens: Words, behind: Sequence[int]) -> Sequence[Tensor]:
    """On the device the tokens, of which `words` begin with what the host said, and as many numbers as lie `behind`."""
    first, *others = words.split([len(tokens), *behind])
    return tokens if isinstance(tokens, Tensor) else first, *others
