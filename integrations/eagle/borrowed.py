"""What a head takes from the base that it drafts for: its embedding, its output head, its dtype and device.

Knows where a base keeps them. Nothing here writes to the base or registers anything on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppd_compose.finish import OutputHead
from ppd_compose.packed import is_packed, pack_layers

from .head import Head
from .levels import LevelPrice
from .network import DraftNetwork


@dataclass(frozen=True)
class Parts:
    """A head ready to draft: all on one device, in one dtype."""

    network: DraftNetwork
    embed: Callable[[Tensor], Tensor]  # token ids int64 [rows] to [rows, hidden]
    output: OutputHead
    target_ids: Tensor | None  # int64 [draft vocab], the token that each draft id stands for; None: itself
    price: LevelPrice = field(default_factory=LevelPrice)  # of running it here

    @property
    def device(self) -> torch.device:
        """Where token ids and positions must lie."""
        return self.output.weight.device


def borrow(head: Head, model: PreTrainedModel) -> Parts:
    """`head` on the device of the base's embedding and in its dtype, packed where `model` is."""
    module: Any = model.get_input_embeddings()
    like = module.weight
    network = DraftNetwork.of(head.config, {name: tensor.to(like) for name, tensor in head.network.items()})
    network.positions = [rotary.to(like.device) for rotary in network.positions]
    output = OutputHead.of(model, head.target_ids) if head.lm_head is None else OutputHead(head.lm_head)
    embed = module if head.embedding is None else nn.Embedding.from_pretrained(head.embedding.to(like))
    ids = None if head.target_ids is None else head.target_ids.to(like.device)
    if packed := is_packed(model):
        pack_layers(network)
    return Parts(network.requires_grad_(False), embed, replace(output.to(like), packed=packed), ids)
