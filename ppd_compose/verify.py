"""One forward of the model over a candidate tree and the rows appended to it.

Knows the layout of rows, positions and columns. Does not decide which rows there are or what is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from .mask import layered_mask
from .tree import Appended, TokenTree, ancestors, stacked_parents


@dataclass(frozen=True)
class Context:
    """What is cached: `visible` bool `[columns]`, False for padding."""

    visible: Tensor

    @property
    def length(self) -> int:
        return len(self.visible)

    def grown(self, tokens: int) -> Context:
        """The same with `tokens` more columns."""
        return Context(torch.cat([self.visible, self.visible.new_ones(tokens)]))


@dataclass(frozen=True)
class Verified:
    """What the model says after each node of the tree, and after each appended row."""

    logits: Tensor  # [nodes, vocab], in the model's dtype
    appended: list[Tensor]  # of each block [rows, vocab]
    hidden_states: dict[int, Tensor]  # by layer [rows of the forward, hidden], those asked for


def verify(
    model: PreTrainedModel,
    cache: Cache,
    context: Context,
    tree: TokenTree,
    appended: Sequence[Appended],
    kwargs: Mapping[str, Any],
    layers: Sequence[int] = (),
) -> Verified:
    """Run the tree's nodes and the appended rows below `context`; their keys and values are in `cache` after it.

    `kwargs` go to the forward; `layers` are the hidden states that come back.
    """
    out = model(
        **_rows(model, tree, appended),
        **_who_sees_whom(model, cache, context, tree, appended),
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
        **states_wanted(layers),
        **kwargs,
    )
    sizes = [len(tree), *map(len, appended)]
    logits, *answers = out.logits[0].split(sizes)
    return Verified(logits, list(answers), states_of(out, layers))


def states_wanted(layers: Sequence[int]) -> dict[str, Any]:
    """Keyword arguments of a forward that gives the hidden states of `layers`, and on newer transformers no others."""
    return {"output_hidden_states": list(layers)} if layers else {}


def states_of(out: Any, layers: Sequence[int]) -> dict[int, Tensor]:
    """By layer the hidden states `[rows, hidden]` of the first sequence of a forward."""
    return {layer: out.hidden_states[layer][0] for layer in layers}


def _rows(model: PreTrainedModel, tree: TokenTree, appended: Sequence[Appended]) -> dict[str, Tensor]:
    ids = torch.from_numpy(tree.tokens)[None].to(model.device)
    if not appended:
        return {"input_ids": ids}
    embed = model.get_input_embeddings()(ids)
    own = [rows.embeddings[torch.from_numpy(rows.kinds).to(embed.device)].to(embed) for rows in appended]
    return {"inputs_embeds": torch.cat([embed, *(rows[None] for rows in own)], dim=1)}


def _who_sees_whom(
    model: PreTrainedModel, cache: Cache, context: Context, tree: TokenTree, appended: Sequence[Appended]
) -> dict[str, Any]:
    """Attention mask and position ids; a bare root without padding needs no mask, as in plain decoding."""
    see = torch.from_numpy(ancestors(stacked_parents(tree, appended)))
    visible = context.visible
    positions = int(visible.sum()) + see.sum(1) - 1
    places = {"position_ids": positions[None].to(model.device)}
    if len(see) == 1 and bool(visible.all()):
        return places
    columns = torch.cat([visible.cumsum(0) - 1, positions])
    mask = torch.cat([visible.expand(len(see), -1), see], dim=1)
    masks = layered_mask(model, cache, mask[None], positions[None], columns[None])
    return {"attention_mask": _on(masks, model.device), **places}


def _on(masks: Tensor | dict[str, Tensor], device: torch.device) -> Tensor | dict[str, Tensor]:
    return {kind: mask.to(device) for kind, mask in masks.items()} if isinstance(masks, dict) else masks.to(device)
