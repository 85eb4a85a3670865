"""One forward of the model over a candidate tree and the rows appended to it.

Knows the layout of rows, positions and columns. Does not decide which rows there are or what is accepted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache
from transformers.utils import output_capturing

from .cache import with_cache
from .forward import Forward
from .inplace import count, hide_front, make_room
from .mask import layered_mask
from .tree import Appended, Ints, TokenTree, ancestors, stacked_parents


@dataclass(frozen=True)
class Context:
    """What is cached: `visible` bool `[columns]`, False for padding, and in front of it prefixes, the first one first:
    how many columns each has, and the source of the appended rows that alone see it."""

    visible: Tensor
    prefixes: tuple[tuple[int, int], ...] = ()

    @property
    def length(self) -> int:
        return len(self.visible)

    def grown(self, tokens: int) -> Context:
        """The same with `tokens` more columns."""
        return replace(self, visible=torch.cat([self.visible, self.visible.new_ones(tokens)]))

    def behind(self, prefixes: tuple[tuple[int, int], ...]) -> Context:
        """The same behind `prefixes`."""
        return replace(self, prefixes=prefixes)


@dataclass(frozen=True)
class Verified:
    """What the model says after each node of the tree, and after each appended row."""

    logits: Tensor  # [nodes, vocab], in the model's dtype
    appended: list[Tensor]  # of each block [rows, vocab]
    hidden_states: dict[int, Tensor]  # by layer [rows of the forward, hidden], those asked for
    rows: int = 1  # of the forward: all of them are in the cache after it


def verify(
    forward: Forward,
    cache: Cache,
    context: Context,
    tree: TokenTree,
    appended: Sequence[Appended],
    kwargs: Mapping[str, Any],
    layers: Sequence[int] = (),
) -> Verified:
    """Run the tree's nodes and the appended rows below `context`; their keys and values are in `cache` after it.

    `kwargs` go to the forward; `layers` are the hidden states that come back. The forward's idle rows stand
    at the end and are seen by none. Waits for the device.
    """
    sizes = [len(tree), *map(len, appended)]
    idle = forward.idle(sum(sizes), cache)
    make_room(cache, sum(sizes) + idle)
    front = _in_front(context, tree, appended, idle)
    if not forward.compiled and not front.any():  # a compiled graph has all columns, so that one serves all
        front = front[:, :0]
    hide_front(cache, not front.shape[1])
    out = forward.model(
        **_rows(forward, tree, appended, idle),
        **_who_sees_whom(forward, cache, context, front, stacked_parents(tree, appended)),
        **with_cache(forward.model, cache),
        return_dict=True,
        **states_wanted(layers),
        **kwargs,
    )
    wait(forward.model)
    count(cache, sum(sizes) + idle)
    logits, *answers = out.logits[0, : sum(sizes)].split(sizes)
    return Verified(logits, list(answers), states_of(out, layers), sum(sizes) + idle)


def wait(model: Any) -> None:
    """Until the device of `model` has done what it was told."""
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)


def states_wanted(layers: Sequence[int]) -> dict[str, Any]:
    """Keyword arguments of a forward that gives the hidden states of `layers`, and on newer transformers no others."""
    # Versions between 5.16 and 5.23 take a list too, and number its layers otherwise.
    selects = hasattr(output_capturing, "resolve_hidden_states_indices")
    return {"output_hidden_states": list(layers) if selects else True} if layers else {}


def only_last(model: Any) -> dict[str, Any]:
    """Keyword arguments of a forward that gives the logits of its last row only, where `model` can do that."""
    return {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}


def states_of(out: Any, layers: Sequence[int]) -> dict[int, Tensor]:
    """By layer the hidden states `[rows, hidden]` of the first sequence of a forward."""
    return {layer: out.hidden_states[layer][0] for layer in layers}


def _rows(forward: Forward, tree: TokenTree, appended: Sequence[Appended], idle: int) -> dict[str, Tensor]:
    ids = torch.from_numpy(tree.tokens)[None].to(forward.model.device)
    if not appended and not forward.compiled:
        return {"input_ids": ids}
    embed = forward.model.get_input_embeddings()(ids)  # for a compiled forward always: one graph serves all
    own = [rows.embeddings[torch.from_numpy(rows.kinds).to(embed.device)].to(embed) for rows in appended]
    unseen = embed.new_zeros(1, idle, embed.shape[2])
    return {"inputs_embeds": torch.cat([embed, *(rows[None] for rows in own), unseen], dim=1)}


def _in_front(context: Context, tree: TokenTree, appended: Sequence[Appended], idle: int) -> Tensor:
    """Which rows see which columns of the prefixes, bool `[rows, columns]`: of a tree and idle ones none does."""
    if not context.prefixes:
        return torch.zeros(len(tree) + sum(map(len, appended)) + idle, 0, dtype=torch.bool, device="cpu")
    owners = np.repeat([source for _, source in context.prefixes], [columns for columns, _ in context.prefixes])
    blocks = [np.full(len(rows), rows.source) for rows in appended]
    sources = np.concatenate([np.zeros(len(tree), np.int64), *blocks, np.zeros(idle, np.int64)])
    return torch.from_numpy(sources[:, None] == owners)


def _who_sees_whom(forward: Forward, cache: Cache, context: Context, front: Tensor, parents: Ints) -> dict[str, Any]:
    """Attention mask and position ids; a bare root without padding needs no mask, as in plain decoding. Behind the rows
    of `parents` come idle ones, as many as `front` `[rows, columns]` has beyond."""
    model = forward.model
    see = torch.from_numpy(ancestors(np.concatenate([parents, np.full(len(front) - len(parents), -1)])))
    visible = context.visible
    positions = int(visible.sum()) + see.sum(1) - 1
    places = {"position_ids": positions[None].to(model.device)}
    if len(see) == 1 and bool(visible.all()):
        return places
    # Windows are counted in columns, as transformers does: those that are hidden count too.
    at = context.length + see.sum(1) - 1
    columns = torch.cat([torch.arange(context.length, device="cpu"), at])
    mask = torch.cat([visible.expand(len(see), -1), see], dim=1)
    masks = layered_mask(model, cache, mask[None], at[None], columns[None], front[None])
    return {"attention_mask": _on(masks, model.device), **places}


def _on(masks: Tensor | dict[str, Tensor], device: torch.device) -> Tensor | dict[str, Tensor]:
    return {kind: mask.to(device) for kind, mask in masks.items()} if isinstance(masks, dict) else masks.to(device)
