"""The decoding loop: draft, fit, verify, accept, commit, observe.

Knows the order of a step and the invariant that `ids[-1]` is decided but never in the KV cache. How the drafters take
part in drafting is `drafting`; how `generate` prepared its arguments is `generation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .accept import Picker
from .budget import Budget
from .cache import commit, recording, refuse_forgetful, undone, with_cache
from .check import check_path
from .device import rows_of
from .drafting import Drafting
from .forward import forward_of
from .growing import Growing
from .lineage import ancestors
from .plugins import Plugins
from .stats import Stats
from .step import Answer, Step
from .stopping import Stops
from .tree import Appended, TokenTree
from .verify import Context, Verified, only_last, states_of, states_wanted, verify


@dataclass
class Request:
    """One sequence to decode, as `generate` prepared it.

    `cache` holds the first `cached` tokens already; `visible` bool `[cached + tokens]` is False for padding.
    """

    ids: Tensor  # [1, tokens] int64
    cache: Cache
    visible: Tensor
    cached: int
    picker: Picker
    criteria: StoppingCriteriaList
    streamer: BaseStreamer | None
    chunk: int | None  # tokens of one prefill forward
    budget: Budget
    room: int  # tokens that may be generated
    first: int = 0  # position of the first token


class Decoding:
    """The decoding of one request: a prefill, then steps until a stopping criterion holds."""

    def __init__(self, model: Any, plugins: Plugins, stats: Stats, request: Request) -> None:
        self.model, self.plugins, self.stats, self.request = model, plugins, stats, request
        self.hook = plugins.hook
        self.kwargs, self.layers = plugins.forward_kwargs(model), plugins.hidden_layers(model)
        embeddings: Tensor = model.get_input_embeddings().weight
        self.drafting = Drafting(plugins, stats, embeddings.shape[1])
        self.sequence, self.stops = Growing(request.ids), Stops(request.criteria)
        # More tokens than the configuration says where embeddings were resized and it was not.
        vocab = max(model.config.get_text_config().vocab_size, embeddings.shape[0])
        # Plugins never see padding: neither its tokens nor its hidden states.
        shown = request.visible[-request.ids.shape[1] :].to(request.ids.device)
        ids = request.ids[0][shown].tolist()
        before = int(request.visible.sum()) - len(ids)
        self.step = Step(ids, vocab, request.budget, request.room, tuple(plugins.drafters), before)
        # Less the root, which the first commit adds.
        self.context = Context.of(request.visible[:-1].to(model.device), request.first)
        self.done = False
        self.checks_path = len(self.hook.accept.get_hookimpls()) > 1  # the default accepts a path
        # On the host what drafters ask for is at hand, and other paths than these no device can find.
        plain = request.picker.takes_likeliest and not self.checks_path
        self.foretells = model.device.type != "cpu" and plain and len(self.drafting.foretellers) > 0
        # What is done while a device computes takes no time of its own.
        self.catch_up_stage = "meanwhile" if model.device.type == "cpu" else "verify"

    def run(self) -> Tensor:
        """Decode and return the sequence `[1, length]`, on the device of the prompt."""
        with self.stats.stage("call"):
            try:
                with self.step.ending:
                    decoded = self._decoded()
                    self.catch_up()
                    return decoded
            finally:
                with self.stats.stage("meanwhile"):
                    self.stats.settle()

    def _decoded(self) -> Tensor:
        with self.stats.stage("prefill"):
            verified = self.prefill()
        # Only now: a sliding layer that keeps its past would have kept all of a long prompt.
        with recording(self.request.cache):
            self.forward = forward_of(self.model)  # only now, see `grouped`
            prefixes = self.plugins.prefixes()
            with self.forward.laid_out(self.request.cache, self.context.visible, list(prefixes.values())):
                columns = tuple((prefix.shape[3], source) for source, prefix in prefixes.items())
                self.context = self.context.behind(columns)
                self.hook.start(step=self.step, model=self.model)
                # Broken off here a prompt stays whole, as in `generate`: sliding layers may be past its beginning.
                self.take(TokenTree.chain(self.step.ids[-1]), {}, verified)
                self.observe(verified)
                del verified  # views of logits and hidden states of the whole prompt
                while not self.done:
                    self.advance()
        return self.sequence.all()

    def prefill(self) -> Verified:
        """Bring the prompt into the cache, in chunks where asked for; what the model says after its last token."""
        request, start = self.request, self.request.cached
        states: list[dict[int, Tensor]] = []
        new = request.ids[:, -(len(request.visible) - start) :].to(self.model.device)
        positions = request.first + (request.visible.cumsum(0) - 1).clamp(min=0)[None].to(self.model.device)
        for chunk in new.split(request.chunk or new.shape[1], dim=1):
            end = start + chunk.shape[1]
            seen = request.visible[:end]
            out = self.model(
                input_ids=chunk,
                attention_mask=None if bool(seen.all()) else seen[None].long().to(self.model.device),
                position_ids=positions[:, start:end],
                **with_cache(self.model, request.cache),
                return_dict=True,
                **states_wanted(self.layers),
                **self.kwargs,
                **only_last(self.model),
            )
            refuse_forgetful(self.model, request.cache, end)
            states.append(states_of(out, self.layers))
            start = end
        shown = request.visible[request.cached :].to(self.model.device)
        self.step.hidden_states = {layer: torch.cat([part[layer] for part in states])[shown] for layer in self.layers}
        last = {layer: state[-1:] for layer, state in self.step.hidden_states.items()}
        return Verified(out.logits[0, -1:], [], last)

    def advance(self) -> None:
        """One step: draft, append rows, fit all to the budget, verify, take what the model says, and observe."""
        step, drafting = self.step, self.drafting
        with self.stats.stage("step"):
            tree = drafting.draft(step)
            tree, appended = drafting.fit(step, tree, drafting.append(step, tree))
            step.answers = {}  # so that the last forward's logits are gone before there are new ones
            # Whatever breaks off, a streamer, a criterion or the user: the cache is to hold nothing that was not said.
            with undone(self.request.cache):
                verified = self.verify(tree, appended)
                self.take(tree, appended, verified)
            self.observe(verified)

    def verify(self, tree: TokenTree, appended: dict[Any, Appended]) -> Verified:
        """What the model says after the nodes of `tree` and after the rows appended to it."""
        cache, blocks, before = self.request.cache, list(appended.values()), self.stats.seconds["verify"]
        with self.stats.stage("verify"):
            verified = verify(
                self.forward, cache, self.context, tree, blocks, self.kwargs, self.layers, self.catch_up,
                partial(self.drafting.foretell, self.step, tree, appended) if self.foretells else None,
            )  # fmt: skip
        self.step.seconds = self.stats.seconds["verify"] - before - self.drafting.foretelling(self.step)
        return verified

    def catch_up(self) -> None:
        """Do what was put off, best while the device computes."""
        if self.step.later:
            with self.stats.stage(self.catch_up_stage):
                self.step.catch_up()

    def take(self, tree: TokenTree, appended: dict[Any, Appended], verified: Verified) -> None:
        """Accept a path and commit it."""
        with self.stats.stage("accept"):
            path = self.accept(tree, verified)
        with self.stats.stage("commit"):
            self.commit(tree, appended, verified, path)

    def observe(self, verified: Verified) -> None:
        """Let everyone know what became of the step."""
        with self.stats.stage("observe"):
            self.stats.count(self.step)
        self.drafting.observe(self.step, verified.logits)

    def accept(self, tree: TokenTree, verified: Verified) -> list[int]:
        """Append the accepted tokens one by one, until the path ends or a stopping criterion holds."""
        start = self.sequence.length
        up_to = partial(self._up_to, tree, start)
        pick = self.request.picker.over(verified.logits, up_to, verified.picks)
        path = []
        told = self.hook.accept(step=self.step, tree=tree, logits=verified.logits, pick=pick)
        for node, token in check_path(told, tree, self.step.vocab_size) if self.checks_path else told:
            path.append(node)
            self.step.ids.append(token)
            self.sequence.append(token)
            if self.request.streamer is not None:
                self.request.streamer.put(torch.tensor([token], device="cpu"))
            scores = tuple(self.request.picker.scores) or None
            if self.stops(self.sequence.all, self.sequence.length, token, scores):
                self.done = True
                break
        return path

    def _up_to(self, tree: TokenTree, start: int, node: int) -> Tensor:
        """The sequence `[1, length]` up to `node`."""
        tokens = torch.from_numpy(tree.tokens[ancestors(tree.parents)[node]][1:])
        return torch.cat([self.sequence.first(start), tokens[None].to(self.request.ids.device)], dim=1)

    def commit(self, tree: TokenTree, appended: dict[Any, Appended], verified: Verified, path: list[int]) -> None:
        """Keep the path's rows in the cache, and hand the plugins what the forward told."""
        step = self.step
        commit(self.request.cache, verified.rows, path)
        self.context = self.context.grown(len(path))
        step.index, step.tree, step.path = step.index + 1, tree, path
        step.rows = len(tree) + sum(map(len, appended.values()))
        step.room -= len(path)
        step.foretold = dict(verified.foretold) if path[-1] == verified.end else {}
        step.answers = _answers(path[-1], len(tree), appended, verified)
        # Copies, as somebody may keep them for long, and these alone.
        step.hidden_states = {layer: rows_of(told, path).clone() for layer, told in verified.hidden_states.items()}


def _answers(node: int, nodes: int, appended: dict[Any, Appended], verified: Verified) -> dict[Any, Answer]:
    """What the rows that hang from `node` said, in a forward of a tree of `nodes` nodes and the rows appended to it."""
    answers, begin = {}, nodes
    for (drafter, rows), logits in zip(appended.items(), verified.appended, strict=True):
        mine = np.flatnonzero(rows.nodes == node)
        states = {layer: rows_of(told, (begin + mine).tolist()) for layer, told in verified.hidden_states.items()}
        answers[drafter] = Answer(rows.kinds[mine], rows_of(logits, mine.tolist()), states)
        begin += len(rows)
    return answers
