"""Hidden states of replies: what draft heads are trained on.

Knows how to ask a frozen base for them once and keep them while memory allows. Does not know any head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .replies import Reply
from .verify import only_last, states_of, states_wanted

KEPT_BYTES = 8 << 30


class ReplyStates:
    """Hidden states of a reply at the layers named, numbered as by `output_hidden_states`.

    Args:
        base: frozen, in evaluation mode.
        layers: which hidden states; the last one is normalised.
        max_length: tokens of prompt and reply that are used.
        kept_bytes: states up to this size in all are kept on the host, so that a second epoch needs no forward.
    """

    def __init__(
        self, base: PreTrainedModel, layers: Sequence[int], max_length: int, kept_bytes: int = KEPT_BYTES
    ) -> None:
        self.base, self.layers, self.max_length, self.free = base, list(layers), max_length, kept_bytes
        self.kept: dict[tuple[int, ...], dict[int, Tensor]] = {}

    def __call__(self, reply: Reply) -> dict[int, Tensor]:
        """By layer `[length, hidden]` in the base's dtype, on the base's device."""
        ids = tuple(reply.ids[: self.max_length])
        states = self.kept.get(ids)
        if states is None:
            states = self._ask(ids)
            size = sum(state.nbytes for state in states.values())
            if size <= self.free:
                self.free -= size
                self.kept[ids] = {layer: state.cpu() for layer, state in states.items()}
        return {layer: state.to(self.base.device) for layer, state in states.items()}

    @torch.no_grad()
    def _ask(self, ids: tuple[int, ...]) -> dict[int, Tensor]:
        model: Any = self.base
        # Of the output head, which this does not need, as little as the model allows.
        given = torch.tensor([ids], device=model.device)
        out = model(input_ids=given, **states_wanted(self.layers), **only_last(model))
        return states_of(out, self.layers)
