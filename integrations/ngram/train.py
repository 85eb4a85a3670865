"""From a base and prompts to an n-gram table: the whole of `ppd-compose train ngram`.

Knows counting and smoothing. The replies are the core's.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppd_compose.identity import Identity
from ppd_compose.prompts import Prompt
from ppd_compose.replies import Reply
from ppd_compose.training_setup import refuse_out, split_replies, training_facts

from .card import model_card
from .drafter import NGramTable
from .table import MOST, Table

SEEN = 2  # times that a context must be followed by something, a token counting once a reply
LEAST = 1e-4  # fainter chances the file's 16 bits would blur, and at last lose
RANKS = 8  # of the accuracies

Context = tuple[int, ...]


@dataclass(frozen=True)
class NGramRecipe:
    """What decides the table. `order`: tokens of the longest contexts; `width`: tokens kept after each; `least`: chance
    below which none is kept."""

    order: int = 2
    width: int = 8
    least: float = 0.01

    def __post_init__(self) -> None:
        if not 1 <= self.order <= MOST or self.width < 1 or not LEAST <= self.least < 1:
            raise ValueError(
                f"need an order from 1 to {MOST}, a width of at least 1 and {LEAST} <= least < 1, got {self}"
            )


def train_ngram(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    out: Path,
    recipe: NGramRecipe,
    *,
    base_name: str | None = None,
    held_out: int = 64,
    reply_tokens: int = 160,
    reply_batch: int = 32,
    command: str = "",
    data: str = "",
) -> NGramTable:
    """Count the own replies of `base` to `prompts` and save the table to `out`.

    The last `held_out` prompts (at most a tenth) are kept for the accuracies. Replies are cached by base and prompt, so
    a killed call goes on where it stopped. Raises `ValueError` for what cannot be counted or written to.
    """
    refuse_out(out, NGramTable)
    begin = time.monotonic()
    replies, held = split_replies(base, tokenizer, prompts, held_out, reply_tokens, reply_batch)
    table = counted_table(replies, recipe)
    identity = Identity.of(base, base_name)
    facts = training_facts(base, asdict(recipe), replies, held, time.monotonic() - begin, command, data)
    made = NGramTable(table, accuracy=evaluate(table, held), identity=identity, training=facts)
    made.save_pretrained(out, card=model_card(made))
    return made


def counted_table(replies: Sequence[Reply], recipe: NGramRecipe) -> Table:
    """Chances of the next token by interpolation of all context lengths (Witten and Bell 1991, method C): where a
    context is followed by something n times, a token counting once a reply, and by u different tokens, u / (n + u) of
    the chance is left to the context that is one token shorter.

    Raises `ValueError` when nothing is said twice.
    """
    known: dict[Context, dict[int, float]] = {(): {}}
    for following in counts(replies, recipe.order):
        for context, counter in following.items():
            if counter.total() >= SEEN:
                known[context] = _best(_interpolated(counter, known[context[1:]]), recipe)
    del known[()]
    known = {context: following for context, following in known.items() if following}
    if not known:
        raise ValueError(f"{len(replies)} replies say nothing twice: give more prompts")
    return Table.of(known, recipe.order)


def counts(replies: Sequence[Reply], order: int) -> list[dict[Context, Counter[int]]]:
    """By length of the context, from 1 to `order`: in how many replies a token follows it.

    Replies are counted, not occurrences: a reply that repeats itself says nothing of others.
    """
    found: list[dict[Context, Counter[int]]] = [defaultdict(Counter) for _ in range(order)]
    for reply in replies:
        ids = reply.prompt[-order:] + reply.reply
        begin = len(ids) - len(reply.reply)
        for length, following in enumerate(found, 1):
            places = range(max(begin, length), len(ids))
            for *context, token in {tuple(ids[at - length : at + 1]) for at in places}:
                following[tuple(context)][token] += 1
    return found


def _interpolated(counter: Counter[int], shorter: Mapping[int, float]) -> dict[int, float]:
    total, kinds = counter.total(), len(counter)
    chances = {token: times / (total + kinds) for token, times in counter.items()}
    for token, chance in shorter.items():
        chances[token] = chances.get(token, 0.0) + chance * kinds / (total + kinds)
    return chances


def _best(chances: Mapping[int, float], recipe: NGramRecipe) -> dict[int, float]:
    ranked = sorted(chances.items(), key=lambda entry: (-entry[1], entry[0]))[: recipe.width]
    return {token: chance for token, chance in ranked if chance >= recipe.least}


def evaluate(table: Table, replies: Sequence[Reply]) -> list[float]:
    """How often the next token was the guess of each rank `[RANKS]`."""
    hits, seen = [0] * RANKS, 0
    for reply in replies:
        ids, begin = reply.ids, len(reply.prompt)
        for at in range(begin, len(ids)):
            ranked = [token for token, _ in table.after(ids[max(0, at - table.order) : at])[:RANKS]]
            seen += 1
            if ids[at] in ranked:
                hits[ranked.index(ids[at])] += 1
    return [hit / max(seen, 1) for hit in hits]
