"""What a draft model has read of one sequence, and forwards that look at guesses of what comes next.

Knows the draft model's KV cache: the tokens read, and below the last of them the rows looked at so far. Does not know
which guesses are worth a look.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ppd_compose.cache import commit, with_cache
from ppd_compose.mask import attention_mask
from ppd_compose.top import best_tokens, on_host
from ppd_compose.tree import Floats, Ints, ancestors

CHUNK = 512  # tokens of a prompt that are read in one forward

# Row -1 is the last token read; rows 0, 1, ... were looked at since, in that order.
ROOT = -1


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
    """

    def __init__(
        self, model: PreTrainedModel, prompts: Tensor, vocab_size: int, width: int, prefix: Tensor | None = None
    ) -> None:
        self.model, self.prompts, self.vocab_size, self.width = model, prompts, vocab_size, width
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
        self.keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.length = 0  # tokens read
        self.parents: list[int] = []  # of the rows looked at
        self.rows: dict[tuple[int, int], int] = {}  # (parent, token): the row that holds it

    def read(self, ids: Sequence[int], prompts: int) -> Ahead:
        """Read the tokens of `ids` that are new; those that were looked at as guesses need no second forward.

        Returns what is expected after the last token, by itself and by up to `prompts` prompt tokens below it:
        `[1, 1 + prompts, width]`.
        """
        self._settle(ids)
        while len(ids) - self.length > CHUNK:
            self._read(ids[self.length : self.length + CHUNK], 0)
        return self._read(ids[self.length :], prompts)

    def look(self, tokens: Sequence[int], parents: Sequence[int], prompts: int) -> Ahead:
        """Look at guesses: row i holds `tokens[i]` and stands below row `parents[i]`, looked at before or now.

        Returns what is expected after each of them `[rows, 1 + prompts, width]`, as `read` does.
        """
        told = self._forward(tokens, parents, len(tokens), prompts)
        for token, parent in zip(tokens, parents, strict=True):
            self.rows[parent, token] = len(self.parents)
            self.parents.append(parent)
        return told

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
        told = self._forward(tokens, range(ROOT, len(tokens) - 1), 1, prompts)
        self.length += len(tokens)
        return told

    @torch.no_grad()
    def _forward(self, tokens: Sequence[int], parents: Sequence[int], told: int, prompts: int) -> Ahead:
        """One forward of new rows and, below each of the last `told` of them, of prompt tokens, whose rows leave the
        cache again."""
        own = self.prompts[:prompts]
        below = _hanging(len(self.parents) + len(tokens), told, *own.shape[:2])
        keep: dict[str, Any] = {"logits_to_keep": told + len(below)} if self.keeps_logits else {}
        model: Any = self.model
        out = model(
            **self._inputs(tokens, own.flatten(0, 1).repeat(told, 1)),
            **self._places([*self.parents, *parents, *below], len(below)),
            **keep,
            **with_cache(model, self.cache),
            return_dict=True,
        )
        commit(self.cache, len(below), [])
        return self._best(out.logits[0, -told - len(below) :, : self.vocab_size].float(), told, *own.shape[:2])

    def _inputs(self, tokens: Sequence[int], prompts: Tensor) -> dict[str, Tensor]:
        ids = torch.tensor([list(tokens)], device=self.model.device)
        if not len(prompts):
            return {"input_ids": ids}
        embed = self.model.get_input_embeddings()(ids)
        return {"inputs_embeds": torch.cat([embed, prompts[None].to(embed)], dim=1)}

    def _places(self, parents: Sequence[int], prompts: int) -> dict[str, Any]:
        """Position ids and mask of the rows behind those looked at already, the last `prompts` being prompt tokens; a
        mere chain needs no mask where nothing stands before the sequence."""
        old, rows = len(self.parents), np.asarray(parents, np.int64)
        if not self.front and np.array_equal(rows, np.arange(ROOT, len(rows) - 1)):
            return {"position_ids": self._standing(torch.arange(old, len(rows), device="cpu"))}
        see = torch.from_numpy(ancestors(rows))
        depths = see.sum(1) - 1
        columns = torch.cat([torch.arange(-self.length, 0, device="cpu"), depths])
        see = torch.cat([see.new_ones(len(rows) - old, self.length), see[old:]], dim=1)
        apart = depths[old:, None] - columns
        front = (torch.arange(len(see), device="cpu") >= len(see) - prompts)[:, None].expand(-1, self.front)
        masks = {
            "full_attention" if window is None else "sliding_attention": attention_mask(
                self.model, (torch.cat([front, see], dim=1) if window is None else see & (apart < window))[None, None]
            ).to(self.model.device)
            for window in self.windows
        }
        mask = masks if len(masks) > 1 else next(iter(masks.values()))
        return {"position_ids": self._standing(depths[old:]), "attention_mask": mask}

    def _standing(self, depths: Tensor) -> Tensor:
        """Position ids `[1, rows]` of rows at `depths` behind the tokens read."""
        # Prompt tokens behind the last position guess tokens that there is no room for: any position will do.
        at = self.length + depths
        return (at if self.positions is None else at.clamp(max=self.positions - 1))[None].to(self.model.device)

    def _best(self, logits: Tensor, rows: int, n: int, v: int) -> Ahead:
        """The best guesses from `logits` `[rows + rows * n * v, vocab]`: of the rows, then of their prompt tokens."""
        if n and v > 1:
            each = logits[rows:].log_softmax(-1).view(rows * n, v, -1)
            logits = torch.cat([logits[:rows], each.logsumexp(1) - math.log(v)])
        claims, tokens = on_host(*best_tokens(logits, self.width))
        return Ahead(_by_row(tokens, rows), _by_row(claims, rows).astype(np.float64))


def _hanging(rows: int, told: int, n: int, v: int) -> list[int]:
    """Parents of the rows of prompt tokens, which come after `rows` others, `n` below each of the last `told`: an
    embedding sees the same embedding of those before it (the ensemble mask; PPD, section 3.2)."""
    parents = rows + np.arange(told * n * v).reshape(told, n, v) - v
    parents[:, :1] = np.arange(rows - told, rows)[:, None, None]
    return [int(parent) for parent in parents.ravel()]


def _by_row(best: Any, rows: int) -> Any:
    """`[rows, 1 + n, width]` from `[rows + rows * n, width]`."""
    return np.concatenate([best[:rows, None], best[rows:].reshape(rows, -1, best.shape[1])], axis=1)
