"""Medusa heads at work on one sequence: their forwards, each launched at once where a device can record them.

Knows what heads are asked for. Does not know what they compute, nor candidate trees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ppd_compose.changes import state_of_layer
from ppd_compose.device import for_host
from ppd_compose.finish import output_head
from ppd_compose.forward import recorder_of
from ppd_compose.recorders import Recorder
from ppd_compose.replayed import Lending, Lendings, RecordingStore, Replayed
from ppd_compose.top import best_tokens

from .heads import Heads, Placed, placed
from .prompt_heads import PromptHeads


class Running:
    """Heads ready to run beside one base, for one sequence at a time.

    Args:
        placed: the heads.
        width: guesses of each head that are searched for.
        make_recorder: makes what records their forwards; None: they are launched.
    """

    def __init__(self, placed: Placed, width: int, make_recorder: Callable[[], Recorder] | None) -> None:
        self.placed, self.width, self.token_map = placed, width, placed.heads.token_map
        store = make_recorder and RecordingStore(make_recorder, "forwards of Medusa heads")
        device = placed.heads.weight.device
        self.guesses, self.reread = (Replayed(run, device, store) for run in (self._guesses, self._reread))

    def _guesses(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Logarithms of chances and tokens `[heads, width]`, `for_host`, after `hidden` `[1, hidden]`."""
        log_probs, best = best_tokens(self.placed.logits(hidden)[:, 0], self.width)
        return for_host(log_probs, best if self.token_map is None else self.token_map[best])

    def _reread(self, states: Tensor, last: Tensor, root: Tensor) -> tuple[Tensor, ...]:
        """Logits `[distances, entries]` of what prompt tokens say by their states `[distances, 1, hidden]`, that of the
        last token `[1, hidden]` and the root `[1]`."""
        return (self.placed.reread(states, last, root)[:, 0],)


class Ready:
    """Heads and those that read prompt tokens, made ready beside each base once while its output head and the way of
    its forwards stay as they are.

    Args:
        width: guesses of each head that are searched for.
    """

    def __init__(self, heads: Heads, prompt_heads: PromptHeads | None, width: int) -> None:
        self.heads, self.prompt_heads, self.width = heads, prompt_heads, width
        self._at: dict[tuple[torch.device, torch.dtype], tuple[Heads, PromptHeads | None]] = {}
        self._lendings: Lendings[Running] = Lendings()

    def beside(self, model: PreTrainedModel) -> Lending[Running]:
        """They at work beside `model`."""
        layer, make_recorder = output_head(model), recorder_of(model)
        state = [*map(state_of_layer, (layer, model.get_input_embeddings())), make_recorder is None]
        placed_at = partial(self._placed, layer.weight, model)
        return self._lendings.of(model, state, lambda: partial(Running, placed_at(), self.width, make_recorder))

    def _placed(self, weight: Tensor, model: PreTrainedModel) -> Placed:
        """Both kinds of heads on the device of `weight` and in its dtype."""
        place = weight.device, weight.dtype
        if place not in self._at:
            self._at[place] = self.heads.to(weight), self.prompt_heads and self.prompt_heads.to(weight)
        return placed(*self._at[place], model)


@dataclass
class Held:
    """What is at hand for one sequence."""

    layer: int  # whose hidden states are read
    running: Running
