"""Whose guesses are right? By drafter, depth and rank, and what becomes of them in the tree that is verified.

A drafter is right at a depth when it guessed, before anything is cut, the token that the model then writes there, below
tokens that it or another guessed rightly. The rank is that of the right child among those that it gives its parent, by
the highest claim that anyone makes for each. Decodes in float32, where every composition writes the same text.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.progress import track

from ppd_compose import TokenTree, compose, hookimpl
from ppd_compose.bench import greedy
from ppd_compose.cli import drafters_of
from ppd_compose.environment import environment
from ppd_compose.loading import load_base
from ppd_compose.prompts import read_prompts
from ppd_compose.questions import Question, questions_from
from ppd_compose.tree import union

ALL = ("ppd", "medusa", "eagle", "ngram", "recycling", "lookup")
AHEAD = 8  # tokens of the model's own continuation that drafts are compared with


class Drafts:
    """Observer: every drafter's own draft of each step, kept until the text is known."""

    name = "drafts"

    def __init__(self) -> None:
        self.made: dict[int, list[TokenTree]] = {}  # by the tokens that were known, the root among them

    @hookimpl(tryfirst=True)
    def merge(self, step: Any, trees: Sequence[TokenTree]) -> None:
        """Keep what was proposed, once more with what extends it, and leave the merging to others."""
        self.made[len(step.ids)] = [tree for tree in trees if len(tree) > 1]


def hits(ids: list[int], known: int, drafts: Sequence[TokenTree], source: int) -> dict[int, int]:
    """By depth the rank of the right child among those that `source` guessed there, as far as `drafts` hold the text;
    the best is 0. A depth at which others guessed the text and `source` did not is left out."""
    tree, ranks, node = union(drafts), {}, 0
    for depth, token in enumerate(ids[known : known + AHEAD], 1):
        children = np.flatnonzero(tree.parents == node)
        mine = children[(tree.sources[children] & source) > 0]
        mine = mine[np.argsort(-tree.log_probs[mine], kind="stable")]
        if len(right := np.flatnonzero(tree.tokens[mine] == token)):
            ranks[depth] = int(right[0])
        if (following := tree.child(node, token)) is None:
            break
        node = following
    return ranks


def measured(base: Any, listing: str, questions: Sequence[Question], tokens: int, rows: int) -> dict[str, Any]:
    """Figures of one composition."""
    drafts, made = Drafts(), Counter[str]()
    names = listing.split("+")
    right: dict[str, dict[int, Counter[int]]] = defaultdict(lambda: defaultdict(Counter))
    model = compose(base, *drafters_of(listing), budget=rows, plugins=[drafts])
    for question in track(questions, listing):
        drafts.made.clear()
        ids = greedy(model, question.ids, tokens)
        made.update(forwards=model.stats.forwards, tokens=model.stats.tokens, rows=model.stats.rows)
        for known, trees in drafts.made.items():
            for bit, name in enumerate(names):
                if any((tree.sources & 1 << bit).any() for tree in trees):
                    made[name] += 1
                    for depth, rank in hits(ids, known, trees, 1 << bit).items():
                        right[name][depth][rank] += 1
    return {
        "drafters": listing,
        "tokens_per_forward": made["tokens"] / made["forwards"],
        "rows_per_forward": made["rows"] / made["forwards"],
        "drafts": {name: made[name] for name in names},
        "right": {
            name: {
                depth: {rank: n / made[name] for rank, n in sorted(by_rank.items())} for depth, by_rank in of.items()
            }
            for name, of in right.items()
        },
    }


def main(
    questions: Annotated[Path, typer.Option(help="JSON lines, as of Spec-Bench.")],
    drafters: Annotated[list[str] | None, typer.Option(help="Joined by '+'. Repeatable.")] = None,
    per_category: int = 2,
    tokens: int = 96,
    rows: Annotated[int, typer.Option(help="Most rows of a forward, each at the same price.")] = 32,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result there.")] = None,
) -> None:
    """Print, as the last line, the result as JSON."""
    loaded = load_base("demo", "float32")
    asked = questions_from(read_prompts(questions), loaded.tokenizer, per_category)
    listings = drafters or [*ALL, "+".join(ALL)]
    command = (
        f"python benchmarks/acceptance.py --questions {questions.name} --per-category {per_category} "
        f"--tokens {tokens} --rows {rows}"
    )
    result = {
        "environment": environment(loaded.model, command),
        "compositions": [measured(loaded.model, listing, asked, tokens, rows) for listing in listings],
    }
    if json_file:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
