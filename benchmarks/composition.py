"""Does composing pay, and which part of it? Drafters alone and together, and together with one part left out.

Decodes in float32, where every variant writes the same text. Seconds are those that the budget's curve gives for each
forward, and the host time that was measured, so that what else runs on the machine does not matter much. With a fixed
number of rows only the tokens per forward mean something.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import typer
from ppd_compose.integrations.medusa import MC_SIM_7B_63, MedusaHeads
from rich.progress import track
from sweep import Forwards

from ppd_compose import Budget, TokenTree, compose, hookimpl
from ppd_compose.alternatives import AlwaysAsk, HighestClaim
from ppd_compose.bench import greedy
from ppd_compose.drafters import load_drafter
from ppd_compose.environment import environment
from ppd_compose.evidence import Evidence
from ppd_compose.loading import load_base
from ppd_compose.offline import OfflinePromptTokens
from ppd_compose.prompts import read_prompts
from ppd_compose.questions import Question, questions_from
from ppd_compose.rows import BestRows

STATIC = 16  # rows of trees that are the same at every step


class Unlearnt(Evidence):
    """Claims are pooled by the weights to start from."""

    name = "unlearnt"

    observe = None  # nothing is learnt


class Trusting(BestRows):
    """Gains of appended rows are believed."""

    name = "trusting"

    def __init__(self) -> None:
        super().__init__()
        self.worth.kept = lambda rows: 1.0  # type: ignore[method-assign]


class Rooted:
    """A drafter that continues only the root, not what others guess."""

    def __init__(self, drafter: Any) -> None:
        self.name, self.drafter = drafter.name, drafter

    @hookimpl
    def start(self, step: Any, model: Any) -> None:
        self.drafter.start(step=step, model=model)

    @hookimpl
    def propose(self, step: Any) -> Any:
        return self.drafter.extend(step=step, tree=TokenTree.chain(step.ids[-1]))

    @hookimpl
    def observe(self, step: Any, logits: Any) -> None:
        self.drafter.observe(step=step, logits=logits)


def variants(names: Sequence[str]) -> Iterator[tuple[str, list[Any], list[Any]]]:
    """Name, drafters and plugins."""

    def fresh() -> list[Any]:
        return [load_drafter(name) for name in names]

    yield from ((name, [load_drafter(name)], []) for name in names)
    yield "all", fresh(), []
    yield "all, highest claim", fresh(), [HighestClaim()]
    yield "all, weights not learnt", fresh(), [Unlearnt(names)]
    yield "all, promises believed", fresh(), [Trusting()]
    yield "all, always asked", fresh(), [AlwaysAsk()]
    if "recycling" in names:
        yield "all, nobody extends", [Rooted(d) if d.name == "recycling" else d for d in fresh()], []
    if "ppd" in names:
        yield f"ppd, offline tree of {STATIC} rows", [OfflinePromptTokens(load_drafter("ppd"), STATIC)], []
    if "medusa" in names:
        heads = load_drafter("medusa").heads
        yield "medusa, static tree", [MedusaHeads(heads, choices=MC_SIM_7B_63[:STATIC])], []


def subsets(names: Sequence[str], largest: int) -> Iterator[tuple[str, list[Any], list[Any]]]:
    """Every set of up to `largest` drafters, and all of them."""
    sizes = [*range(1, min(largest, len(names) - 1) + 1), len(names)]
    for chosen in (chosen for size in sizes for chosen in combinations(names, size)):
        yield "+".join(chosen), [load_drafter(name) for name in chosen], []


def decoded(base: Any, questions: Sequence[Question], tokens: int, budget: Budget, variant: Any) -> dict[str, Any]:
    """Figures of one variant over all questions."""
    name, drafters, plugins = variant
    verified = Forwards()
    model = compose(base, *drafters, budget=budget, plugins=[*plugins, verified], packed=True)
    made = forwards = rows = expected = host = 0.0
    for question in track(questions, name):
        greedy(model, question.ids, tokens)
        stats = model.stats
        made, forwards, rows = made + stats.tokens, forwards + stats.forwards, rows + stats.rows
        expected, host = expected + stats.expected, host + stats.host_seconds
    return {
        "name": name,
        "tokens_per_forward": made / forwards,
        "rows_per_forward": rows / forwards,
        "expected_over_found": expected / made,
        "host_ms_per_step": 1000 * host / forwards,
        "tokens_per_second": verified.tokens / (verified.seconds(budget) + host),
        "tokens_per_second_of_forwards": verified.rate(budget),
    }


def main(
    questions: Annotated[Path, typer.Option(help="JSON lines, as of Spec-Bench.")],
    curve: Annotated[Path, typer.Option(help="Budget, as JSON, whose seconds count.")],
    drafters: Annotated[str, typer.Option(help="Names joined by '+'.")] = "ppd+ngram+recycling+lookup",
    per_category: int = 3,
    tokens: int = 96,
    rows: Annotated[int, typer.Option(help="A fixed number of rows instead of the budget's choice; 0 is none.")] = 0,
    largest: Annotated[
        int, typer.Option("--subsets", help="Sets of up to so many drafters and all, instead of ablations; 0 is none.")
    ] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result there.")] = None,
) -> None:
    """Print a line a variant, and as the last line the result as JSON."""
    loaded = load_base("demo", "float32")
    asked = questions_from(read_prompts(questions), loaded.tokenizer, per_category)
    budget = Budget.flat(rows) if rows else Budget.load(curve)
    told = []
    names = drafters.split("+")
    for variant in subsets(names, largest) if largest else variants(names):
        told.append(decoded(loaded.model, asked, tokens, budget, variant))
        print(told[-1], flush=True)
    command = (
        f"python benchmarks/composition.py --questions {questions.name} --curve {curve.name} --drafters {drafters} "
        f"--per-category {per_category} --tokens {tokens} --rows {rows} --subsets {largest}"
    )
    result = {
        "environment": environment(loaded.model, command),
        "budget": asdict(budget),
        "variants": told,
    }
    if json_file:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
