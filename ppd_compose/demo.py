"""The demonstration: one answer streamed with its guessed tokens coloured, then the same by plain `generate`.

Knows how to show. Bases and prompt tokens come from elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from .bench import Answered, best_two, divergence
from .compose import compose
from .hookspecs import hookimpl
from .loading import LoadedBase
from .prompts import encode
from .step import Step

COLOURS = ("green", "cyan", "magenta", "yellow", "blue")


class Painter:
    """Observer that writes each step's tokens: guessed ones in the colour of their drafter, the model's own plain."""

    name = "painter"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, console: Console, prompt_length: int) -> None:
        self.tokenizer, self.console, self.prompt_length = tokenizer, console, prompt_length
        self.shown = ""

    @hookimpl
    def observe(self, step: Step) -> None:
        """Write the tokens that this step added."""
        if step.tree is None:
            return
        sources = [int(step.tree.sources[node]) for node in step.path[1:]] + [0]
        start = len(step.ids) - len(sources)
        for at, source in enumerate(sources, start + 1):
            text = str(self.tokenizer.decode(step.ids[self.prompt_length : at], skip_special_tokens=True))
            if not text.endswith("\ufffd"):  # half of a character: wait for the rest of it
                self.console.print(Text(text[len(self.shown) :], style=colour(source)), end="")
                self.shown = text


def colour(sources: int) -> str:
    """The colour of the first drafter among `sources`, none for the model's own token."""
    return COLOURS[((sources & -sources).bit_length() - 1) % len(COLOURS)] if sources else ""


def demo(
    loaded: LoadedBase,
    drafters: Sequence[Any],
    question: str,
    max_new_tokens: int,
    console: Console,
    way: Mapping[str, Any],
) -> dict[str, Any]:
    """Answer `question` twice and print what composing in this `way` gave; returns the same as data."""
    ids = torch.tensor([encode(loaded.tokenizer, question)], device=loaded.model.device)
    painter = Painter(loaded.tokenizer, console, ids.shape[1])
    model = compose(loaded.model, *drafters, plugins=[painter], **way)
    console.print(Text(question, style="bold"), "\n")
    compose(loaded.model, *drafters, **way).warmup()
    _timed(loaded.model, ids, 8)
    fast, fast_seconds = _timed(model, ids, max_new_tokens)
    console.print("\n\n[dim]the same with plain generate ...[/]")
    plain, plain_seconds = _timed(loaded.model, ids, max_new_tokens)
    mine, theirs = (Answered("demo", ids.shape[1], ids=x[0].tolist()) for x in (fast, plain))
    told = {
        "tokens": fast.shape[1] - ids.shape[1],
        "tokens_per_forward": model.stats.tokens_per_forward,
        "speedup": (fast.shape[1] - ids.shape[1]) / fast_seconds / ((plain.shape[1] - ids.shape[1]) / plain_seconds),
        "divergence": divergence(mine, theirs, partial(best_two, loaded.model, theirs)),
    }
    console.print(_verdict(told, model.plugins.drafters))
    return told


def _timed(model: Any, ids: torch.Tensor, max_new_tokens: int) -> tuple[torch.Tensor, float]:
    begin = time.perf_counter()
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens,
        return_dict_in_generate=False,
    )  # fmt: skip
    return out, time.perf_counter() - begin


def _verdict(told: dict[str, Any], drafters: Any) -> Text:
    parted = told["divergence"]
    same = "the same tokens"
    if parted is not None:
        same = f"tokens that part at number {parted['position'] + 1}, the two best logits {parted['gap']:.3f} apart"
    legend = [part for i, name in enumerate(drafters) for part in ((name, COLOURS[i % len(COLOURS)]), " ")]
    return Text.assemble(
        f"\n{told['tokens']} tokens, {told['tokens_per_forward']:.2f} per forward, ",
        (f"{told['speedup']:.2f} times the speed of generate", "bold"), f", {same}; guessed by ", *legend,
    )  # fmt: skip
