"""What happened in each step of one answer: the tree, who guessed which node, and the path that was accepted.

Knows steps and a tokenizer. How it is shown is `report`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .bench import greedy
from .hookspecs import hookimpl
from .step import Step

HALF = "\ufffd"  # what a tokenizer gives for half of a character


class Trace:
    """Observer that keeps the steps of a generation as plain data."""

    name = "trace"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.steps: list[dict[str, Any]] = []
        self.tokens: list[dict[str, Any]] = []

    @hookimpl
    def observe(self, step: Step) -> None:
        """Keep one step: its nodes, with chance and drafters, and the tokens that it made."""
        tree = step.tree
        if tree is None or step.index == 1:  # the prefill
            return
        path = set(step.path)
        self.steps.append({
            "rows": step.rows,
            "nodes": [
                {
                    "text": self._text(token),
                    "parent": parent,
                    "chance": round(chance, 4),
                    "drafters": self._names(step, source),
                    "accepted": node in path,
                }
                for node, (token, parent, chance, source) in enumerate(
                    zip(tree.tokens.tolist(), tree.parents.tolist(), np.exp(tree.log_probs).tolist(),
                        tree.sources.tolist(), strict=True)
                )
            ],
        })  # fmt: skip
        guessed = [int(tree.sources[node]) for node in step.path[1:]]
        for token, source in zip(step.ids[-len(step.path) :], [*guessed, 0], strict=True):
            self.tokens.append({"text": self._text(token), "drafters": self._names(step, source)})

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token])).replace(HALF, "?")

    @staticmethod
    def _names(step: Step, sources: int) -> list[str]:
        return [name for bit, name in enumerate(step.drafters) if sources >> bit & 1]


def traced(model: Any, tokenizer: PreTrainedTokenizerBase, ids: Tensor, max_new_tokens: int) -> dict[str, Any]:
    """The tokens of one greedy answer of a composed `model` to `ids` `[1, length]`, and its widest step."""
    trace = Trace(tokenizer)
    model.plugins.manager.register(trace)
    try:
        greedy(model, ids, max_new_tokens)
    finally:
        model.plugins.manager.unregister(trace)
    accepted = [sum(node["accepted"] for node in step["nodes"]) for step in trace.steps]
    shown = trace.steps[int(np.argmax(accepted))] if accepted else None
    return {"tokens": trace.tokens, "step": shown}
