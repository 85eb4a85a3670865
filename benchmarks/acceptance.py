"""Whose guesses are right? By drafter, depth and rank, and what becomes of them in the tree that is verified.

A drafter is right at a depth when its own draft, before anything is cut, holds the tokens that the model then writes;
the rank is that of the right child among those that the drafter gives its parent. Decodes in float32, where every
composition writes the same text.
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
from ppd_compose.bench import Question, greedy, questions_from
from ppd_compose.cli import drafters_of
from ppd_compose.environment import environment
from ppd_compose.loading import load_base
from ppd_compose.prompts import read_prompts

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


def hits(ids: list[int], known: int, draft: TokenTree) -> list[int]:
    """The rank of the right child at depth 1, 2, ... as far as the draft holds the text; the best is 0."""
    ranks, node = [], 0
    for token in ids[known : known + AHEAD]:
        children = np.flatnonzero(draft.parents == node)
        children = children[np.argsort(-draft.log_probs[children], kind="stable")]
        right = np.flatnonzero(draft.tokens[children] == token)
        if not len(right):
            break
        ranks.append(int(right[0]))
        node = int(children[right[0]])
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
        for known, draft in ((known, draft) for known, each in drafts.made.items() for draft in each):
            owner = names[int(np.bitwise_or.reduce(draft.sources)).bit_length() - 1]
            made[owner] += 1
            for depth, rank in enumerate(hits(ids, known, draft), 1):
                right[owner][depth][rank] += 1
    return {
        "drafters": listing,
        "tokens_per_forward": made["tokens"] / made["forwards"],
        "rows_per_forward": made["rows"] / made["forwards"],
        "drafts": {name: made[name] for name in names},
        "right": {
            name: {depth: {rank: n / made[name] for rank, n in sorted(by_rank.items())} for depth, by_rank in of.items()}
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
    listings = drafters or ["ppd", "medusa", "eagle", "lookup", "recycling", "ppd+medusa+eagle+recycling+lookup"]
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
