"""Acceptance that keeps the model's distribution: the model picks a token after a node, and the child that
holds it lives.

Knows picks and paths. Does not know where the candidate tree came from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from .hookspecs import hookimpl
from .tree import TokenTree


class MatchPicks:
    """Exact at every temperature: greedy with argmax, sampling with one draw a node.

    Each pick is the token that plain decoding would have put there, so the tokens, and with a seed the draws
    too, are those of plain decoding.
    """

    @hookimpl(trylast=True)
    def accept(self, tree: TokenTree, pick: Callable[[int], int]) -> Iterator[tuple[int, int]]:
        """Walk down from the root while the model's pick is among the children."""
        node: int | None = 0
        while node is not None:
            token = pick(node)
            yield node, token
            node = tree.child(node, token)


class Picker:
    """The model's own choice after a node: processors with the sequence up to it, then argmax or one draw."""

    def __init__(
        self,
        processors: LogitsProcessorList,
        do_sample: bool,
        generator: torch.Generator | None,
        keeps_scores: bool,
        keeps_logits: bool,
    ) -> None:
        self.processors, self.do_sample, self.generator = processors, do_sample, generator
        self.keeps_scores, self.keeps_logits = keeps_scores, keeps_logits
        self.scores: list[Tensor] = []  # processed [1, vocab] float32, one for each pick, where kept
        self.logits: list[Tensor] = []  # as the model gave them [1, vocab] float32, where kept

    @property
    def takes_likeliest(self) -> bool:
        """Whether a pick is the likeliest token, and nothing is kept of it."""
        return not (self.processors or self.do_sample or self.keeps_scores or self.keeps_logits)

    def over(
        self, logits: Tensor, up_to: Callable[[int], Tensor], best: Sequence[int] | None = None
    ) -> Callable[[int], int]:
        """Picks over one tree: `logits` `[nodes, vocab]`; `up_to(node)` is the sequence `[1, length]` up to it; `best`
        `[nodes]` are the likeliest tokens, where they are known."""
        if self.takes_likeliest:
            return _argmax(logits) if best is None else best.__getitem__
        return lambda node: self._pick(logits[node][None], up_to(node))

    def _pick(self, logits: Tensor, ids: Tensor) -> int:
        # A copy: processors may write in place, and the forward's logits must not be kept alive.
        # Where the prompt is, as in `generate`: there the processors are, and there the draws are made.
        raw = logits.to(ids.device, torch.float32, copy=True)
        scores: Any = self.processors(cast(torch.LongTensor, ids), cast(torch.FloatTensor, raw))
        if self.keeps_logits:
            self.logits.append(logits.to(ids.device, torch.float32, copy=True))
        if self.keeps_scores:
            self.scores.append(scores)
        if not self.do_sample:
            return int(scores.argmax(-1))
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self.generator))


def _argmax(logits: Tensor) -> Callable[[int], int]:
    """Greedy picks in float32, as `generate` takes them: on the host only the rows asked for, on an accelerator all
    rows in one download."""
    if logits.device.type == "cpu":
        if logits.dtype == torch.float32:
            rows = logits.numpy()
            return lambda node: int(rows[node].argmax())
        return lambda node: int(logits[node].float().numpy().argmax())  # numpy searches four times as fast
    picks = logits.float().argmax(-1).tolist()
    return lambda node: int(picks[node])
