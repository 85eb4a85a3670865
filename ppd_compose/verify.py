"""One forward of the model over a candidate tree and the rows appended to it.

Knows the layout of rows, positions and columns. Does not decide which rows there are or what is accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import Cache
from transformers.utils import output_capturing

from .cache import with_cache
from .device import wait
from .fixed import Memory, memory_of
from .forward import Forward
from .inplace import count, hide, make_room
from .lineage import ancestors, row_depths
from .mask import layered_mask, unplanned
from .recorded import Inputs, Outputs, play
from .tree import Appended, Bools, Ints, TokenTree, stacked_parents
from .underway import Asked, Underway


@dataclass(frozen=True)
class Context:
    """What a forward sees of the past: `length` columns of the cache, and in front of them `prefixes`, in order. Each
    is told by how many columns it has, and the source of the only appended rows that see it."""

    length: int
    flags: Tensor  # bool [length or more], where the model is, False for padding; others do not count yet
    tokens: int  # columns that are no padding
    prefixes: tuple[tuple[int, int], ...] = ()
    first: int = 0  # position of the first token

    @classmethod
    def of(cls, visible: Tensor, first: int = 0) -> Context:
        """As many columns as `visible` bool `[columns]` has, False for padding; the `first` token's position."""
        return cls(len(visible), visible, int(visible.sum()), first=first)

    @property
    def visible(self) -> Tensor:
        """Bool `[length]`, False for padding."""
        return self.flags[: self.length]

    def positions(self, depths: Ints) -> Ints:
        """Position ids `[rows]` of rows at these `depths` `[rows]` of a tree below what is cached."""
        return self.first + self.tokens + depths

    def grown(self, tokens: int) -> Context:
        """The same with `tokens` more columns."""
        length, flags = self.length + tokens, self.flags
        if length > len(flags):  # twice as many, so that few steps copy them
            flags = torch.cat([self.visible, flags.new_ones(tokens + self.length)])
        return Context(length, flags, self.tokens + tokens, self.prefixes, self.first)

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
    picks: list[int] | None = None  # the likeliest token after each node, where the forward told that
    end: int = -1  # the node at which the path ends that follows these
    foretold: Mapping[Any, Sequence[Tensor]] = field(default_factory=dict)  # by drafter, where it ends there


def verify(
    forward: Forward,
    cache: Cache,
    context: Context,
    tree: TokenTree,
    appended: Sequence[Appended],
    kwargs: Mapping[str, Any],
    layers: Sequence[int] = (),
    meanwhile: Callable[[], None] = lambda: None,
    foretell: Callable[[Underway], Asked] | None = None,
) -> Verified:
    """Run the tree's nodes and the appended rows below `context`; their keys and values are in `cache` after it.

    `kwargs` go to the forward; `layers` are the hidden states that come back. The forward's idle rows stand at the end
    and are seen by none. Launches the forward and what `foretell` asks of the device next, calls `meanwhile` while the
    device computes, then waits for it.
    """
    sizes = [len(tree), *map(len, appended)]
    idle = forward.idle(sum(sizes), cache)
    rows, wanted = _Rows(tree, appended, idle), {**states_wanted(layers), **kwargs}
    if (memory := memory_of(cache)) is None:
        out = _launched(forward, cache, context, rows, wanted, foretell is not None)
    else:
        out = _played(forward, memory, context, rows, wanted)
    states = states_of(out, layers)
    bring = _bringing(out, states, len(tree), foretell)
    meanwhile()
    told = bring()
    wait(forward.device)
    count(cache, len(rows))
    keep = torch.detach if memory is None else torch.clone  # what a recorded one left is written over by the next
    logits, *answers = keep(out.logits[0, : sum(sizes)]).split(sizes)
    return Verified(logits, list(answers), {layer: keep(state) for layer, state in states.items()}, len(rows), *told)


def _bringing(
    out: Outputs, states: Mapping[int, Tensor], nodes: int, foretell: Callable[[Underway], Asked] | None
) -> Callable[[], tuple[Any, ...]]:
    """Launches what `foretell` asks for; what is given brings the last three of `Verified`, where the device tells."""
    if out.end is None:
        return tuple
    underway = Underway(nodes, out.logits[0], states, out.end)
    return underway.bringing(foretell(underway) if foretell else {})


def states_wanted(layers: Sequence[int]) -> dict[str, Any]:
    """Keyword arguments of a forward that gives the hidden states of `layers`, and on newer transformers no others."""
    # Versions between 5.16 and 5.23 take a list too, and number its layers otherwise.
    selects = hasattr(output_capturing, "resolve_hidden_states_indices")
    return {"output_hidden_states": list(layers) if selects else True} if layers else {}


def only_last(model: Any, rows: int = 1) -> dict[str, Any]:
    """Keyword arguments of a forward that gives the logits of its last `rows` only, where `model` can do that."""
    return {"logits_to_keep": rows} if model._supports_logits_to_keep() else {}


def states_of(out: Any, layers: Sequence[int]) -> dict[int, Tensor]:
    """By layer the hidden states `[rows, hidden]` of the first sequence of a forward."""
    return {layer: out.hidden_states[layer][0] for layer in layers}


@dataclass(frozen=True)
class _Rows:
    """All rows of a forward: a tree's, those appended to it, and idle ones, each of which sees itself alone."""

    tree: TokenTree
    appended: Sequence[Appended]
    idle: int

    def __len__(self) -> int:
        return len(self.tree) + sum(map(len, self.appended)) + self.idle

    def words(self) -> Ints:
        """Of each row its token, or which of its block's embeddings it carries."""
        return np.concatenate([self.tree.tokens, *(rows.kinds for rows in self.appended), np.zeros(self.idle, int)])

    def embedded(self, embed: nn.Module, words: Tensor) -> Tensor:
        """What the rows of `words` `[rows]` are in the model's space `[1, rows, hidden]`; `embed` gives that of
        tokens."""
        end, words = len(self.tree), words[None]
        parts = [embed(words[:, :end])]
        for rows in self.appended:
            begin, end = end, end + len(rows)
            kinds = words[:, begin:end].to(rows.embeddings.device)
            parts.append(embedding(kinds, rows.embeddings).to(parts[0]))
        if self.idle:
            parts.append(parts[0].new_zeros(1, self.idle, parts[0].shape[2]))
        return torch.cat(parts, dim=1)

    def inputs(self, context: Context, begin: int, front: Bools) -> Inputs:
        """What their forward is given: they stand behind `begin` columns, in `front` of which others see some."""
        parents = np.concatenate([stacked_parents(self.tree, self.appended), np.full(self.idle, -1)])
        positions = context.positions(row_depths(parents))
        return Inputs.of(begin, self.words(), positions, ancestors(parents), front, len(self.tree))

    def see_in_front(self, context: Context) -> Bools:
        """Which rows see which columns of the prefixes `[rows, columns]`: of a tree and idle ones none does."""
        if not context.prefixes:
            return np.zeros((len(self), 0), bool)
        owners = np.repeat([source for _, source in context.prefixes], [columns for columns, _ in context.prefixes])
        blocks = [np.full(len(rows), rows.source) for rows in self.appended]
        sources = np.concatenate([np.zeros(len(self.tree), int), *blocks, np.zeros(self.idle, int)])
        seen: Bools = sources[:, None] == owners
        return seen


def _launched(
    forward: Forward, cache: Cache, context: Context, rows: _Rows, wanted: Mapping[str, Any], finds_end: bool
) -> Outputs:
    """What the model says of `rows`, below keys and values wherever they lie."""
    make_room(cache, len(rows))
    front = rows.see_in_front(context)
    if not forward.compiled and not front.any():  # a compiled graph has all columns, so that one serves all
        front = front[:, :0]
    hide(cache, front=not front.shape[1], stale=not forward.compiled)
    inputs = rows.inputs(context, context.length, front).there(forward.device)
    # For a compiled forward always embeddings: one graph serves all.
    plain, words = not rows.appended and not forward.compiled, inputs.words
    given = {"input_ids": words[None]} if plain else {"inputs_embeds": rows.embedded(forward.embed, words)}
    told = _who_sees_whom(forward, cache, context, inputs)
    # Without a mask a row is computed as in plain decoding, to the last bit.
    with unplanned(forward.device) if "attention_mask" in told else nullcontext():
        out = forward.model(**given, **told, **with_cache(forward.model, cache), return_dict=True, **wanted)
    return Outputs(out.logits, out.hidden_states, inputs.end(out.logits[0]) if finds_end else None)


def _played(forward: Forward, memory: Memory, context: Context, rows: _Rows, wanted: Mapping[str, Any]) -> Outputs:
    """The same by what was recorded over `memory`, in which the keys and values lie."""
    memory.make_room(len(rows))
    inputs = rows.inputs(context, memory.columns, rows.see_in_front(context))
    return play(forward.model, memory, inputs, partial(rows.embedded, forward.embed), wanted)


def _who_sees_whom(forward: Forward, cache: Cache, context: Context, inputs: Inputs) -> dict[str, Any]:
    """Attention mask and position ids; a bare root without padding needs no mask, as in plain decoding."""
    _, _, positions, own, front = inputs.parts()
    # Of a view a compiled graph takes the place where it begins for one of the sizes.
    places = {"position_ids": (positions.clone() if forward.compiled else positions)[None]}
    if inputs.rows == 1 and context.tokens == context.length:
        return places
    see = torch.cat([context.visible.expand(1, inputs.rows, -1), own[None]], dim=2)
    # Windows are counted in columns, as transformers does: those that are hidden count too.
    at = positions + (context.length - context.first - context.tokens)
    columns = torch.cat([torch.arange(context.length, device=at.device), at])
    mask = layered_mask(forward.attention, cache, see, at[None], columns[None], front[None])
    return {"attention_mask": mask, **places}
