"""EAGLE (arXiv 2401.15077, 2406.16858, 2503.01840): a small network continues the base's hidden states and guesses on.

Knows when in a step the draft layer learns, drafts and grows the trees of others. Does not know how trees grow, what
the files look like or how a head is trained.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ppd_compose import Step, TokenTree, hookimpl
from ppd_compose.changes import state_of_layer
from ppd_compose.finish import refuse_other_logits
from ppd_compose.forward import recorder_of
from ppd_compose.hub import PushesToHub
from ppd_compose.identity import Identity
from ppd_compose.replayed import Lending, Lendings

from .borrowed import borrow
from .card import head_card
from .draft_cache import DraftCache
from .files import is_head, read_head
from .grow import ROOT, Frontier, dynamic_tree, foreign_paths, leaves_of, levels_below
from .head import Head, write_head
from .levels import Levels
from .network import Drafted
from .rows import DraftRows
from .whole import Level

RECENT = 8  # drafts by which the next one's levels are run on a device


@dataclass
class Memory:
    """What a head remembers of one sequence."""

    rows: DraftRows
    layers: Sequence[int]  # which hidden states are read
    root: Drafted | None = None  # output of the pair of the present root; None where nothing was drafted
    tree: TokenTree | None = None  # what was proposed in this step
    wanted: deque[int] = field(default_factory=lambda: deque(maxlen=RECENT))  # levels of the last drafts

    def learn(self, step: Step) -> None:
        """Take in the step's hidden states."""
        self.rows.learn([step.hidden_states[layer] for layer in self.layers])


class EagleHead(PushesToHub):
    """Drafter: one decoder layer that reads the base's hidden states and drafts EAGLE-2's dynamic tree.

    EAGLE-1/2 heads read the base's last hidden state and use its output head, EAGLE-3 heads read three hidden
    states and have an output head, or rows of the base's. All run in the base's dtype, on the device of its embedding.
    A head serves several bases and sequences; the base is never written to.

    Args:
        head: configuration and weights, as `files.read_head` gives them.
        depth: how often the frontier is expanded, at most, after the root's children were guessed; candidates reach
            `depth + 1`. With a measured budget a draft of its own ends where one more level would not pay.
        top_k: nodes of a frontier, and children guessed for each.
        grow: leaves of other drafters' guesses that are continued, the likeliest first. Each level of their paths costs
            one more draft forward, so that none are by default.

    Raises:
        ValueError: depth or grow below 0, top_k below 1.
    """

    name = "eagle"

    def __init__(self, head: Head, *, depth: int = 5, top_k: int = 8, grow: int = 0) -> None:
        if depth < 0 or top_k < 1 or grow < 0:
            raise ValueError(f"need depth, grow >= 0 and top_k >= 1, got {depth}, {grow} and {top_k}")
        self.head, self.depth, self.top_k, self.grow = head, depth, top_k, grow
        self.settings = {"depth": depth, "top_k": top_k, "grow": grow}
        self._lendings: Lendings[DraftCache] = Lendings()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        depth: int = 5,
        top_k: int = 8,
        grow: int = 0,
    ) -> EagleHead:
        """Load a head from a folder or the Hub: official EAGLE-1/2 and EAGLE-3, SpecForge or speculators layout.

        See `files.read_head` for what is refused.
        """
        return cls(read_head(source, revision=revision, token=token), depth=depth, top_k=top_k, grow=grow)

    @staticmethod
    def recognises(config: Mapping[str, Any], files: Collection[str]) -> bool:
        """Whether a folder with this configuration and these files holds an EAGLE head."""
        return is_head(config, files)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json`, `model.safetensors` and a card."""
        write_head(self.head, Path(folder), card=head_card(self.head))

    @hookimpl
    def prepare(self, model: PreTrainedModel) -> None:
        """Refuse a base of other sizes; warn when only its weights differ from those trained on."""
        base = Identity.of(model)
        _check_sizes(self.head, base, model.config.get_text_config().vocab_size)
        depth = model.config.get_text_config().num_hidden_layers
        if self.head.config.version == 3 and max(self.hidden_layers(model)) >= depth:
            raise ValueError(
                f"this EAGLE head reads the hidden states {self.hidden_layers(model)}, {base} has {depth} layers, "
                f"whose inputs are 0 to {depth - 1}: it was trained for a deeper base"
            )
        if self.head.lm_head is None:
            refuse_other_logits(model)
        if self.head.identity is not None:
            self.head.identity.warn_of_other_weights(base, "this EAGLE head")

    @hookimpl
    def hidden_layers(self, model: PreTrainedModel) -> Sequence[int]:
        """The last hidden state for EAGLE-1/2, three for EAGLE-3."""
        return self.head.config.reads(model.config.get_text_config().num_hidden_layers)

    @hookimpl
    def start(self, step: Step, model: PreTrainedModel) -> None:
        """Take in the hidden states of the prompt. Refuse a base that has lost tokens since it was composed."""
        embeddings: Any = model.get_input_embeddings()
        rows, known = len(embeddings.weight), self.head.config.vocab_size
        if rows < known:
            raise ValueError(f"this EAGLE head knows {known} tokens, of which the base has {rows} by now: compose anew")
        layers = self.hidden_layers(model)
        first = len(step.ids) - len(step.hidden_states[layers[0]])
        cache = step.ending.enter_context(self._ready(model).lent())
        step.ending.callback(cache.clear)
        memory = step.memory[self] = Memory(DraftRows(cache, first), layers)
        memory.learn(step)

    @hookimpl
    def propose(self, step: Step) -> TokenTree | None:
        """The dynamic tree, of as many nodes as the budget has rows and as many levels as pay."""
        memory: Memory = step.memory[self]
        # A node deeper than the room left can never be accepted.
        size, most = step.budget.max_rows - 1, min(self.depth, step.room - 2)
        if size < 1 or most < 0:
            return None
        price = memory.rows.parts.price
        curve = None if step.budget.fixed else step.budget.curve(step.length)
        levels = price.levels(most, curve, step.rate)
        recorded = memory.rows.cache.recorded
        below = self._below(memory, step, levels, min(self.top_k, size))
        memory.tree = dynamic_tree(TokenTree.chain(step.ids[-1]), ROOT, below, levels, size)
        if memory.rows.cache.recorded == recorded:
            price.book(levels)
        memory.wanted.append(levels.made)
        return memory.tree

    @hookimpl
    def extend(self, step: Step, tree: TokenTree) -> TokenTree | None:
        """Continue the likeliest leaves that others proposed, by their claim times the draft's own probabilities."""
        memory: Memory = step.memory[self]
        if not self.grow or memory.root is None or memory.tree is None:
            return None
        paths = foreign_paths(tree, memory.tree, self.grow, step.room - 2)
        if paths is None:
            return None
        memory.rows.drop()
        (frontier, leaves), size = leaves_of(memory.rows, memory.root, paths), step.budget.max_rows - 1
        levels = Levels(min(self.depth, step.room - 2 - int(frontier.depths.max())))
        below = levels_below(memory.rows, frontier, min(self.top_k, size))
        return dynamic_tree(paths, leaves, below, levels, size)

    @hookimpl
    def observe(self, step: Step) -> None:
        """Take in the hidden states of the accepted path; that of the prompt's last token is known already."""
        memory: Memory = step.memory[self]
        memory.root = memory.tree = None
        if step.index > 1:
            memory.learn(step)

    def _below(self, memory: Memory, step: Step, levels: Levels, width: int) -> Iterator[Level]:
        """The levels below the root: one after the other as they are asked for, or on a device those that may be."""
        if not memory.rows.cache.at_once:
            memory.root = memory.rows.accept(step.ids)
            return levels_below(memory.rows, Frontier.root(memory.root), width)
        memory.root, below = memory.rows.draft(step.ids, levels.run_ahead(self.depth, memory.wanted), width)
        return below

    def _ready(self, model: PreTrainedModel) -> Lending[DraftCache]:
        """The head on the device of `model` and in its dtype, made once while these, and the way of the forwards, stay
        as they are."""
        make_recorder = recorder_of(model)
        layers = model.get_input_embeddings(), model.get_output_embeddings()
        state = [*map(state_of_layer, layers), make_recorder is None]
        return self._lendings.of(model, state, lambda: partial(DraftCache, borrow(self.head, model), make_recorder))


def _check_sizes(head: Head, base: Identity, vocab_size: int) -> None:
    """Raise `ValueError` when `head` was made for a base of another width or vocabulary than `base`."""
    config = head.config
    trained = head.identity or f"a base of hidden size {config.state_size} and vocabulary {config.vocab_size}"
    if base.hidden_size != config.state_size or vocab_size != config.vocab_size:
        raise ValueError(f"this EAGLE head was trained for {trained}; it cannot be used on {base}")
    own = {"embedding": head.embedding, "output head": head.lm_head}
    lacking = [name for name, tensor in own.items() if tensor is None]
    if lacking and config.hidden_size != base.hidden_size:
        raise ValueError(
            f"this EAGLE head of width {config.hidden_size} has no {' and no '.join(lacking)} of its own and cannot "
            f"use what {base} has: its files are not complete, fetch them again"
        )
