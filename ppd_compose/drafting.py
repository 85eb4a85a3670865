"""What plugins do in a step: who is asked, what all propose, merged, extended and fitted into one forward; and who is
told what became of it.

Knows the drafters' names, bits and turns. Does not know the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .changes import state_of
from .check import check_answer, check_appended, check_embeddings, check_fitted, check_foretold, check_tree
from .device import timed
from .plugins import Plugins
from .stats import Stats
from .step import Answer, Reached, Step
from .tree import Appended, TokenTree, shallow
from .underway import Asked, Underway


class Drafting:
    """Calls the drafting hooks of `plugins` in order, checks what they return, and books their seconds.

    Args:
        width: of the model's embeddings.
    """

    def __init__(self, plugins: Plugins, stats: Stats, width: int) -> None:
        self.plugins, self.stats, self.hook, self.width = plugins, stats, plugins.hook, width
        self.proposers = plugins.each_drafter("propose")
        self.extenders = plugins.each_drafter("extend")
        self.appenders = plugins.each_drafter("append")
        self.foretellers = plugins.each_drafter("foretell")
        self.observers, self.observed = plugins.observers()
        self.bits = plugins.bits
        self.refinable = plugins.drafters if self.hook.refine.get_hookimpls() else {}
        # The default is given checked trees and makes one of them; of what others make nobody knows.
        self.checks_merged, self.checks_fitted = (
            len(hook.get_hookimpls()) > 1 for hook in (self.hook.merge, self.hook.fit)
        )
        self.took: list[tuple[str, Callable[[], float]]] = []  # by whom, what devices took of what is foretold
        self.checked: dict[str, tuple[Tensor, tuple[int, int]]] = {}  # the embeddings that drafters appended last

    def draft(self, step: Step) -> TokenTree:
        """What all drafters propose, merged into one tree, and extended."""
        asked = [name for name in self.plugins.drafters if self._takes_part(step, name)]
        step.drafting = {name: step.observing.get(name, 0.0) for name in asked}
        self._refine(step)
        trees = [TokenTree.of([step.ids[-1]], [-1], [0.0])]
        for name, _, propose in self.proposers:
            trees += [made.marked(self.bits[name]) for made in self._asked(step, "propose", name, propose)]
        tree = self._merged(step, trees)
        grown: list[TokenTree] = []
        for name, _, extend in self.extenders:
            made = self._asked(step, "extend", name, partial(extend, tree=tree.marked(0)))
            grown += [more.marked_beyond(tree, self.bits[name]) for more in made]
        return self._merged(step, [*trees, *grown]) if grown else tree

    def append(self, step: Step, tree: TokenTree) -> dict[Any, Appended]:
        """By drafter, in the order given, the rows that it hangs from nodes of `tree`."""
        appended: dict[Any, Appended] = {}
        for name, drafter, append in self.appenders:
            with self.stats.stage(f"append {name}"):
                for rows in append(step=step, tree=tree):
                    appended[drafter] = check_appended(rows, name, tree).marked(self.bits[name])
                    self._look_at(rows.embeddings, name)
        return appended

    def fit(
        self, step: Step, tree: TokenTree, appended: Mapping[Any, Appended]
    ) -> tuple[TokenTree, dict[Any, Appended]]:
        """Tree and appended rows, cut to the budget; a drafter of whose rows none is left is left out."""
        with self.stats.stage("fit"):
            tree, blocks = _within_room(step, tree, list(appended.values()))
            fitted = self.hook.fit(step=step, tree=tree, appended=blocks)
            if self.checks_fitted:
                names = [name for name, drafter, _ in self.appenders if drafter in appended]
                fitted = check_fitted(fitted, step, names)
            tree, kept = fitted
        return tree, {drafter: rows for drafter, rows in zip(appended, kept, strict=True) if len(rows)}

    def foretell(self, step: Step, tree: TokenTree, appended: Mapping[Any, Appended], underway: Underway) -> Asked:
        """What drafters ask of a device while it computes a forward of `tree` and the rows `appended` to it."""
        reached, answers = underway.reached, underway.answers(appended)
        asked: dict[Any, Sequence[Tensor]] = {}
        for name, drafter, foretell in self.foretellers:
            with timed(reached.root.device) as seconds:
                if drafter in answers:
                    answers[drafter] = self._refined(step, name, drafter, answers[drafter], reached)
                told = foretell(
                    step=step, tree=tree, logits=underway.logits[: len(tree)], reached=reached, answers=answers
                )
            self.took.append((name, seconds))
            if told:
                asked[drafter] = check_foretold(told[0], name)
        return asked

    def foretelling(self, step: Step) -> float:
        """Seconds that the device took for what was foretold, once it was waited for: on its drafters' account."""
        step.observing = {name: seconds() for name, seconds in self.took}
        self.took = []
        return sum(step.observing.values())

    def observe(self, step: Step, logits: Tensor) -> None:
        """Let everyone know what became of the step, drafters on their own time."""
        for name, observe in self.observers:
            begin = time.perf_counter()
            with self.stats.stage(f"observe {name}"):
                observe(step=step, logits=logits)
            step.observing[name] = step.observing.get(name, 0.0) + time.perf_counter() - begin
        with self.stats.stage("observe"):
            self.observed(step=step, logits=logits)

    def _refine(self, step: Step) -> None:
        """Let who can tell better what appended rows say do so, on the time of the drafter whose rows they are."""
        for name, drafter in self.refinable.items():
            answer = step.answers.get(drafter)
            if answer is not None and len(answer.kinds) and drafter not in step.foretold:
                begin = time.perf_counter()
                with self.stats.stage(f"refine {name}"):
                    step.answers[drafter] = self._refined(step, name, drafter, answer, _reached(step, answer))
                step.drafting[name] += time.perf_counter() - begin

    def _refined(self, step: Step, name: str, drafter: Any, answer: Answer, reached: Reached) -> Answer:
        """The answer of the drafter of that name, told better where somebody can."""
        refined = self.hook.refine(step=step, drafter=drafter, answer=answer, reached=reached)
        return answer if refined is None else check_answer(refined, name)

    def _look_at(self, embeddings: Tensor, name: str) -> None:
        """Check embeddings that were not there at the step before, or have been written since."""
        state = state_of(embeddings)
        known, was = self.checked.get(name, (None, None))
        if known is not embeddings or was != state:
            check_embeddings(embeddings, name, self.width)
            self.checked[name] = embeddings, state

    def _takes_part(self, step: Step, name: str) -> bool:
        """Whether rows that it appended were verified below the last accepted node, or it is that drafter's turn."""
        answer = step.answers.get(self.plugins.drafters[name])
        return (answer is not None and len(answer.kinds) > 0) or bool(self.hook.ask(step=step, drafter=name))

    def _asked(self, step: Step, hook: str, name: str, call: Callable[..., list[TokenTree]]) -> list[TokenTree]:
        """What the drafter of that name drafts, if it takes part."""
        if name not in step.drafting:
            return []
        begin = time.perf_counter()
        with self.stats.stage(f"{hook} {name}"):
            made = [check_tree(tree, f"drafter {name!r}", step.ids[-1], step.vocab_size) for tree in call(step=step)]
        step.drafting[name] += time.perf_counter() - begin
        return made

    def _merged(self, step: Step, trees: Sequence[TokenTree]) -> TokenTree:
        with self.stats.stage("merge"):
            tree: TokenTree = self.hook.merge(step=step, trees=trees)
            if self.checks_merged:
                check_tree(tree, "merge", step.ids[-1], step.vocab_size)
            return tree.lock()  # who extends it or appends rows could else change what was checked


def _reached(step: Step, answer: Answer) -> Reached:
    """Where the path of the last step ended."""
    root = torch.full((1,), step.ids[-1], device=answer.logits.device)
    return Reached(root, {layer: states[-1:] for layer, states in step.hidden_states.items()})


def _within_room(step: Step, tree: TokenTree, blocks: Sequence[Appended]) -> tuple[TokenTree, Sequence[Appended]]:
    """Without rows deeper than the tokens that may still be generated: they can never be used, and may lie beyond the
    model's last position. Behind that position the root goes on alone, as in plain decoding."""
    if step.room > step.budget.max_rows:
        return tree, blocks
    return shallow(tree, blocks, max(step.room - 1, 0))
