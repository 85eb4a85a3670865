"""Does the budget choose well? Its choice on several latency curves against every fixed number of rows.

Decodes in float32, where every number of rows writes the same text, and counts the seconds that each curve gives for
the forwards made, and those that drafts took here. A fixed number of rows is decoded once and priced by every curve.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from ppd_compose import Budget, compose, hookimpl
from ppd_compose.bench import greedy
from ppd_compose.drafters import load_drafter
from ppd_compose.environment import environment
from ppd_compose.loading import load_base
from ppd_compose.offline import OfflinePromptTokens
from ppd_compose.prompts import read_prompts
from ppd_compose.questions import Question, questions_from

FIXED = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)


class Forwards:
    """Observer: context and rows of every forward, and seconds of all drafts; the prefill is not counted."""

    name = "forwards"

    def __init__(self) -> None:
        self.made: list[tuple[int, int]] = []
        self.tokens, self.drafting = 0, 0.0

    @hookimpl
    def observe(self, step: Any) -> None:
        """One more forward."""
        if step.index > 1:
            self.made.append((len(step.ids) - len(step.path), step.rows))
            self.tokens += len(step.path)
            self.drafting += sum(step.drafting.values())

    def seconds(self, curve: Budget) -> float:
        """What the forwards took by `curve`."""
        return sum(float(curve.curve(context)[rows - 1]) for context, rows in self.made)

    def rate(self, curve: Budget) -> float:
        """Tokens per second of forwards by `curve`."""
        return self.tokens / self.seconds(curve)

    def drafted_rate(self, curve: Budget) -> float:
        """The same with the seconds of drafts, as drafters that do not pay for theirs are asked less often."""
        return self.tokens / (self.seconds(curve) + self.drafting)

    def summary(self) -> dict[str, float]:
        """Tokens and rows a forward."""
        rows = sum(rows for _, rows in self.made)
        return {"tokens_per_forward": self.tokens / len(self.made), "rows_per_forward": rows / len(self.made)}


def decoded(base: Any, drafters: list[Any], budget: Budget | int, asked: Sequence[Question], tokens: int) -> Forwards:
    """The forwards of answers to all questions, in one composition."""
    forwards = Forwards()
    model = compose(base, *drafters, budget=budget, plugins=[forwards], packed=True)
    for question in track(asked, f"{'+'.join(d.name for d in drafters)}, {budget if isinstance(budget, int) else ''}"):
        greedy(model, question.ids, tokens)
    return forwards


def swept(base: Any, listing: str, curves: dict[str, Budget], asked: Sequence[Question], tokens: int) -> dict[str, Any]:
    """One drafter set: all fixed numbers of rows, offline trees for prompt tokens, and the choice on each curve."""

    def drafters() -> list[Any]:
        return [load_drafter(name) for name in listing.split("+")]

    fixed = {str(rows): decoded(base, drafters(), rows, asked, tokens) for rows in FIXED}
    if listing == "ppd":
        offline = {rows: OfflinePromptTokens(drafters()[0], rows) for rows in FIXED[2:]}
        fixed |= {f"offline {rows}": decoded(base, [d], 64, asked, tokens) for rows, d in offline.items()}
    told: dict[str, Any] = {
        "drafters": listing,
        "fixed": {name: f.summary() for name, f in fixed.items()},
        "curves": {},
    }
    for name, curve in curves.items():
        chosen = decoded(base, drafters(), curve, asked, tokens)
        plain = fixed["1"].rate(curve)
        rates = {rows: forwards.drafted_rate(curve) for rows, forwards in fixed.items()} | {"1": plain}
        best = max((rows for rows in rates if rows.isdecimal()), key=lambda rows: rates[rows])
        told["curves"][name] = {
            **chosen.summary(),
            "over_plain": chosen.drafted_rate(curve) / plain,
            "best_fixed": best,
            "over_best_fixed": chosen.drafted_rate(curve) / rates[best],
            "fixed_over_plain": {rows: rate / plain for rows, rate in rates.items()},
        }
        print(listing, name, {k: v for k, v in told["curves"][name].items() if k != "fixed_over_plain"}, flush=True)
    return told


def main(
    questions: Annotated[Path, typer.Option(help="JSON lines, as of Spec-Bench.")],
    curve: Annotated[list[Path], typer.Option(help="A budget, as JSON, up to 64 rows. Repeatable.")],
    drafters: Annotated[list[str], typer.Option(help="Names joined by '+'. Repeatable.")],
    per_category: int = 2,
    tokens: int = 64,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result there.")] = None,
) -> None:
    """Print a line for each drafter set and curve, and as the last line the result as JSON."""
    loaded = load_base("demo", "float32")
    asked = questions_from(read_prompts(questions), loaded.tokenizer, per_category)
    curves = {path.stem: Budget.load(path) for path in curve}
    command = " ".join(
        [
            f"python benchmarks/sweep.py --questions {questions.name} --per-category {per_category} --tokens {tokens}",
            *(f"--curve {path.name}" for path in curve),
            *(f"--drafters {listing}" for listing in drafters),
        ]
    )
    result = {
        "environment": environment(loaded.model, command),
        "curves": {name: {"rows": c.rows, "contexts": c.contexts, "seconds": c.seconds} for name, c in curves.items()},
        "sets": [swept(loaded.model, listing, curves, asked, tokens) for listing in drafters],
    }
    if json_file:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
