"""Hidden states of replies: what draft heads are trained on.

Knows how to ask a frozen base once for each reply and keep what it says while memory allows. Does not know any head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .replies import Reply
from .verify import only_last, states_of, states_wanted

KEPT_BYTES = 8 << 30
Name = TypeVar("Name")


class KeptStates(Generic[Name]):
    """What `ask` tells of a reply, by name, asked once.

    Args:
        base: the model whose device it is told on.
        ask: gives it, on any device.
        kept_bytes: what is told up to this size in all is kept on the host, so that a second epoch needs no forward.
    """

    def __init__(
        self, base: PreTrainedModel, ask: Callable[[Reply], dict[Name, Tensor]], kept_bytes: int = KEPT_BYTES
    ) -> None:
        self.base, self.ask, self.free = base, ask, kept_bytes
        self.kept: dict[tuple[tuple[int, ...], int], dict[Name, Tensor]] = {}

    def __call__(self, reply: Reply) -> dict[Name, Tensor]:
        """By name, on the base's device."""
        key = tuple(reply.ids), len(reply.prompt)
        told = self.kept.get(key)
        if told is None:
            told = self.ask(reply)
            size = sum(states.nbytes for states in told.values())
            if size <= self.free:
                self.free -= size
                self.kept[key] = {name: states.cpu() for name, states in told.items()}
        return {name: states.to(self.base.device) for name, states in told.items()}


class ReplyStates(KeptStates[int]):
    """By layer the hidden states of a reply `[length, hidden]`, in the base's dtype.

    Args:
        base: frozen, in evaluation mode.
        layers: which hidden states, numbered as by `output_hidden_states`; the last one is normalised.
        max_length: tokens of prompt and reply that are used.
        kept_bytes: see `KeptStates`.
    """

    def __init__(
        self, base: PreTrainedModel, layers: Sequence[int], max_length: int, kept_bytes: int = KEPT_BYTES
    ) -> None:
        super().__init__(base, self._ask, kept_bytes)
        self.layers, self.max_length = list(layers), max_length

    @torch.no_grad()
    def _ask(self, reply: Reply) -> dict[int, Tensor]:
        model: Any = self.base
        # Of the output head, which this does not need, as little as the model allows.
        given = torch.tensor([reply.ids[: self.max_length]], device=model.device)
        out = model(input_ids=given, **states_wanted(self.layers), **only_last(model))
        return states_of(out, self.layers)
