"""A whole benchmark: contenders made, run, summarised and shown as a table.

Knows the result's schema. The timing is `bench`, the provenance `environment`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table
from rich.text import Text

from .bench import BASE, Answered, Protocol, WithSettings, best_two, divergence, joined, one_round, summarise
from .compose import compose
from .environment import environment
from .identity import weights_digest
from .journal import Journal
from .loading import LoadedBase
from .questions import Question
from .storage import write_text
from .trace import traced

SCHEMA = 1
TRACED = 64  # tokens of one answer that are told with who guessed them
LONG = 5.0  # seconds to get ready, of which the user is told
NARROWEST = 4  # width of a column of numbers, where all may be left out
WAYS: dict[str, dict[str, Any]] = {
    "eager": {}, "packed": {"packed": True}, "compiled": {"compile": True}, "regions": {"compile": "regions"},
}  # fmt: skip


def composed(
    loaded: LoadedBase,
    listings: Mapping[str, Callable[[], Sequence[Any]]],
    ways: Sequence[str],
    rows: int | None,
    console: Console,
) -> dict[str, Any]:
    """Each listing composed in each of the `ways`, keys of `WAYS`, with at most `rows` rows; ready to decode, of which
    `console` is told what took long.

    A listing makes its drafters, for each way anew: one that learns would tell the next what it has seen.
    """
    made = {
        name if way == "eager" else f"{name} {way}": compose(loaded.model, *drafters(), budget=rows, **WAYS[way])
        for way in ways
        for name, drafters in listings.items()
    }
    for name, model in made.items():
        if (seconds := model.warmup()) > LONG:
            compiled = ", forwards are compiled" if model.forwards.compiled else ""
            console.print(f"{name}: the budget is measured{compiled}, ready after {seconds:.0f} s", highlight=False)
    return made


def plain(loaded: LoadedBase, settings: Sequence[str]) -> dict[str, Any]:
    """Plain generate with each of `settings`, such as "prompt_lookup_num_tokens=10"."""
    return {told: WithSettings(loaded.model, dict([_setting(told)])) for told in settings}


def bench(
    loaded: LoadedBase,
    contenders: Callable[[], Mapping[str, Any]],
    protocol: Protocol,
    command: str,
    console: Console,
    out: Path | None = None,
    skipped: Mapping[str, str] | None = None,
    later: Callable[[], Sequence[Question]] | None = None,
) -> dict[str, Any]:
    """Run base and `contenders`, anything with a device and transformers' `generate`; the result as plain data.

    Args:
        contenders: makes them by name, for each round anew: none may have seen a question before, as what learns while
            it decodes would know the answer.
        out: file that the result is written to, as JSON. Until then finished questions are kept beside it, and a run
            that was cut off goes on where it stopped; what drafters learnt by then is lost.
        skipped: contenders that do not run here, with the reason.
        later: makes the questions with their later turns, for which the base answers those before; they are asked in
            place of the protocol's, which are first turns only. Called when all that can be refused has been.

    Raises `ValueError` without questions, when `out` is a folder, when what is kept beside it is of another run, or
    where `out` is given and some of the base's weights are not in memory, which tell runs apart.
    """
    if not protocol.questions:
        raise ValueError("no question is left to ask: give more of them")
    if out is not None and out.is_dir():
        raise ValueError(f"{out} is a folder: give the file to write the result to")
    made = contenders()
    provenance = environment(loaded.model, command)
    kept = None if out is None else out.with_name(f"{out.name}.part")
    journal = Journal(kept, {} if kept is None else _told_apart(loaded.model, provenance, [BASE, *made], protocol))
    if later is not None:
        protocol = replace(protocol, questions=later())
    journal.refuse_others([question.ids[0].tolist() for question in protocol.questions])
    with Progress(console=console) as progress:
        made = _asked(loaded, made, contenders, protocol, journal, progress)
    by_name = {name: _joined(journal, name, protocol) for name in [BASE, *made]}
    best = [cache(partial(best_two, loaded.model, answer)) for answer in by_name[BASE]]  # all contenders ask for them
    result = {
        "schema": SCHEMA,
        "environment": {**provenance, "base": loaded.name, "base_origin": loaded.origin},
        "protocol": {name: value for name, value in vars(protocol).items() if name != "questions"},
        "skipped": dict(skipped or {}),
        "budgets": {name: asdict(model.budget) for name, model in made.items() if hasattr(model, "plugins")},
        "base": _base(by_name[BASE]),
        "runs": [_report(name, by_name[name], by_name[BASE], best, protocol) for name in made],
        "traces": _traces(loaded, contenders(), protocol),
    }
    if out is not None:
        write_text(out, json.dumps(result, indent=1) + "\n")
    journal.close()
    _show(_table(result), console)
    return result


def _asked(
    loaded: LoadedBase,
    made: Mapping[str, Any],
    contenders: Callable[[], Mapping[str, Any]],
    protocol: Protocol,
    journal: Journal,
    progress: Progress,
) -> Mapping[str, Any]:
    """Ask what is not in `journal`, in the first round those that are `made`; the contenders of the last round."""
    kept, everything = sum(map(len, journal.rounds.values())), protocol.rounds * len(protocol.questions)
    task = progress.add_task("questions", total=everything, completed=kept)
    for turn in range(protocol.rounds):
        done = tuple(journal.rounds[turn])
        if len(done) == len(protocol.questions):
            continue
        made = contenders() if turn else made
        for number, answers in one_round({BASE: loaded.model, **made}, protocol, turn, done):
            journal.keep(turn, number, answers)
            progress.advance(task)
    return made


def _joined(journal: Journal, name: str, protocol: Protocol) -> list[Answered]:
    rounds = [journal.rounds[turn] for turn in range(protocol.rounds)]
    return [joined([answers[number][name] for answers in rounds]) for number in range(len(protocol.questions))]


def _told_apart(
    base: Any, provenance: Mapping[str, Any], everyone: Sequence[str], protocol: Protocol
) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    asked = [question.ids[0].tolist() for question in protocol.questions]
    return {
        **{name: value for name, value in provenance.items() if name != "date"},
        "weights": weights_digest(base),  # a fine-tune may have the fingerprint of what it was made from
        "contenders": {name: _files(name) for name in everyone},
        "questions": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        "how": [protocol.rounds, protocol.max_new_tokens, protocol.temperature],
    }


def _files(contender: str) -> list[Any]:
    """The drafters' files, where the listing that names the contender names folders, and when they were written."""
    listing = next((contender.removesuffix(f" {way}") for way in WAYS if contender.endswith(f" {way}")), contender)
    folders = [Path(part) for part in listing.split("+")]
    return sorted([path.name, path.stat().st_mtime_ns] for folder in folders for path in folder.glob("*.*"))


def _traces(loaded: LoadedBase, contenders: Mapping[str, Any], protocol: Protocol) -> dict[str, Any]:
    ids, tokens = protocol.questions[0].ids, min(protocol.max_new_tokens, TRACED)
    return {
        name: traced(model, loaded.tokenizer, ids, tokens)
        for name, model in contenders.items()
        if hasattr(model, "plugins")
    }


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


def _report(
    name: str,
    answers: Sequence[Answered],
    base: Sequence[Answered],
    best: Sequence[Callable[[], Any]],
    protocol: Protocol,
) -> dict[str, Any]:
    told = summarise(name, answers, base)
    if protocol.temperature:  # of drawn tokens the gap of the two best logits says nothing
        return {**told, "divergences": []}
    parted = [divergence(*those) for those in zip(answers, base, best, strict=True)]
    return {**told, "divergences": [{"question": i, **d} for i, d in enumerate(parted) if d is not None]}


def _table(result: Mapping[str, Any]) -> Table:
    """A row for each contender: its speed-up by category, tokens a forward, and answers identical to the base's."""
    base, where = result["base"], result["environment"]
    headings = ["", *base["by_category"], "all", "tokens/forward", "identical"]
    columns = [Column(Text(heading), overflow="fold") for heading in headings]
    table = Table(*columns, title=Text(f"{where['model']} {where['dtype']}", "table.title"))
    speeds = [*(told["tokens_per_second"] for told in base["by_category"].values()), base["tokens_per_second"]]
    table.add_row("generate, tokens/s", *(f"{speed:.1f}" for speed in speeds))
    table.add_section()
    for told in result["runs"]:
        speedups = [*(told["by_category"][category]["speedup"] for category in base["by_category"]), told["speedup"]]
        forward = f"{told['tokens_per_forward']:.2f}" if told["tokens_per_forward"] else ""
        cells = [*(f"{speedup:.2f}x" for speedup in speedups), forward, f"{told['identical']}/{told['questions']}"]
        table.add_row(Text(told["name"]), *cells)
    return table


def _show(table: Table, console: Console) -> None:
    """Print `table` with nothing cut: as wide as it needs where that is no terminal; else names and headings fold."""
    needed = console.measure(table, options=console.options.update(width=sys.maxsize)).maximum
    if not console.is_terminal:
        table.width = needed
    elif needed > console.width:
        table.box, table.collapse_padding, table.pad_edge = SIMPLE_HEAD, True, False
        for numbers in table.columns[1:]:
            numbers.width = max(NARROWEST, *(len(str(cell)) for cell in numbers.cells))
    console.print(table, crop=False)
