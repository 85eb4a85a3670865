"""A whole benchmark: contenders made, run, summarised and shown as a table.

Knows the result's schema. The timing is `bench`, the provenance `environment`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .bench import BASE, Answered, WithSettings, divergence, questions_from, run, summarise
from .compose import compose
from .environment import environment
from .loading import LoadedBase
from .prompts import Prompt
from .trace import traced

SCHEMA = 1
TRACED = 64  # tokens of one answer that are told with who guessed them
WAYS: dict[str, dict[str, Any]] = {"eager": {}, "packed": {"packed": True}, "compiled": {"compile": True}}


def bench(
    loaded: LoadedBase,
    listings: Mapping[str, Sequence[Any]],
    prompts: Sequence[Prompt],
    per_category: int | None,
    max_new_tokens: int,
    rounds: int,
    rows: int | None,
    ways: Sequence[str],
    command: str,
    console: Console,
    settings: Sequence[str] = (),
) -> dict[str, Any]:
    """Run base and every listing on the prompts and return the result as plain data.

    Each listing is composed in each of the `ways`, keys of `WAYS`. Each of `settings`, such as
    "prompt_lookup_num_tokens=10", is plain generate with that argument, one contender more.
    """
    composed = {
        name if way == "eager" else f"{name} {way}": compose(loaded.model, *drafters, budget=rows, **WAYS[way])
        for way in ways
        for name, drafters in listings.items()
    }
    for model in composed.values():
        model.warmup()
    budgets = {name: asdict(model.budget) for name, model in composed.items()}
    questions = questions_from(prompts, loaded.tokenizer, per_category)
    composed |= {told: WithSettings(loaded.model, dict([_setting(told)])) for told in settings}
    contenders = {BASE: loaded.model, **composed}
    answers: dict[str, dict[int, Answered]] = {name: {} for name in contenders}
    with Progress(console=console) as progress:
        task = progress.add_task("questions", total=len(questions) * rounds * len(contenders))
        for name, number, answer in run(contenders, questions, rounds, max_new_tokens):
            answers[name][number] = answer
            progress.advance(task)
    traces = {
        name: traced(model, loaded.tokenizer, questions[0].ids, min(max_new_tokens, TRACED))
        for name, model in composed.items()
        if hasattr(model, "plugins")
    }
    by_name = {name: [mine[i] for i in range(len(questions))] for name, mine in answers.items()}
    runs = [_report(loaded, name, by_name[name], by_name[BASE]) for name in composed]
    result = {
        "schema": SCHEMA,
        "environment": {
            **environment(loaded.model, command),
            "base": loaded.name,
            "base_origin": loaded.origin,
        },
        "budgets": budgets,
        "base": _base(by_name[BASE]),
        "runs": runs,
        "traces": traces,
    }
    console.print(_table(result))
    return result


def _setting(told: str) -> tuple[str, Any]:
    name, _, value = told.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        raise ValueError(f"{told!r} is no setting of generate: write it as name=value, the value as JSON") from None


def _base(answers: Sequence[Answered]) -> dict[str, Any]:
    told = summarise(BASE, answers, answers)
    by_category = {c: {"tokens_per_second": d["tokens_per_second"]} for c, d in told["by_category"].items()}
    return {
        "tokens_per_second": told["tokens_per_second"],
        "questions": len(answers),
        "by_category": by_category,
    }


def _report(loaded: LoadedBase, name: str, answers: Sequence[Answered], base: Sequence[Answered]) -> dict[str, Any]:
    parted = [divergence(loaded.model, mine, theirs) for mine, theirs in zip(answers, base, strict=True)]
    divergences = [{"question": i, **d} for i, d in enumerate(parted) if d is not None]
    return {**summarise(name, answers, base), "divergences": divergences}


def _table(result: Mapping[str, Any]) -> Table:
    table = Table("category", "base tok/s", title=f"{result['environment']['model']} {result['environment']['dtype']}")
    for told in result["runs"]:
        table.add_column(f"{told['name']}: speed-up, tokens/forward, identical")
    for category, base in result["base"]["by_category"].items():
        cells = [_cell(told["by_category"][category]) for told in result["runs"]]
        table.add_row(category, f"{base['tokens_per_second']:.1f}", *cells)
    table.add_section()
    table.add_row("all", f"{result['base']['tokens_per_second']:.1f}", *map(_cell, result["runs"]))
    return table


def _cell(told: Mapping[str, Any]) -> str:
    return f"{told['speedup']:.2f}x  {told['tokens_per_forward']:.2f}  {told['identical']}/{told['questions']}"
