"""Tokens per second against the base's own generate: compositions, and what people use now, in one run.

A run that is cut off goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from peers import GGUF_NAME, peers
from rich.console import Console

from ppd_compose import bench_job
from ppd_compose.bench import Protocol, questions_from
from ppd_compose.cli import drafters_of
from ppd_compose.loading import load_base
from ppd_compose.prompts import read_prompts
from ppd_compose.shipped import QUESTIONS

QUICK = {"per_category": 2, "tokens": 48, "rounds": 3}
console = Console(stderr=True)


def main(
    questions: Annotated[Path, typer.Option(help="JSON lines, as of Spec-Bench; ours when left out.")] = QUESTIONS,
    drafters: Annotated[list[str] | None, typer.Option(help="Joined by '+'. Repeatable.")] = None,
    ways: Annotated[str, typer.Option(help="eager, packed, compiled, joined by '+'.")] = "packed",
    peer: Annotated[list[str] | None, typer.Option(help="A peer by name, or 'all'. Repeatable.")] = None,
    gguf: Annotated[Path, typer.Option(help="The base's GGUF, for llama.cpp.")] = Path(GGUF_NAME),
    per_category: Annotated[int, typer.Option(help="Questions of each category.")] = 10,
    tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    rounds: Annotated[int, typer.Option(help="Interleaved; a question counts its median.")] = 3,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    base: Annotated[str, typer.Option(help="Folder, Hub id, or 'demo'.")] = "demo",
    dtype: str = "bfloat16",
    device: str = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="A few questions, in a few minutes.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result there.")] = None,
) -> None:
    """Print a table, and as the last line the result as JSON."""
    if quick:
        per_category, tokens, rounds = QUICK["per_category"], QUICK["tokens"], QUICK["rounds"]
    loaded = load_base(base, dtype, device)
    listings = {listing: drafters_of(listing) for listing in drafters or ["ppd+recycling+lookup"]}
    contenders: dict[str, Any] = bench_job.composed(loaded, listings, ways.split("+"), None)
    skipped = {}
    for name, made, reason in peers(loaded, [] if peer == ["all"] else peer, gguf) if peer else ():
        if made is None:
            skipped[name] = reason
            console.print(f"[yellow]skipped {name}:[/] {reason}", highlight=False)
        else:
            contenders[name] = made
    asked = questions_from(read_prompts(questions), loaded.tokenizer, per_category)
    words = [f"--drafters {listing}" for listing in listings] + [f"--peer {name!r}" for name in peer or []]
    command = (
        f"python benchmarks/throughput.py --questions {questions.name} {' '.join(words)} --ways {ways} --per-category "
        f"{per_category} --tokens {tokens} --rounds {rounds} --temperature {temperature:g} --dtype {dtype}"
    )
    kept = None if json_file is None else json_file.with_name(f"{json_file.name}.part")
    protocol = Protocol(asked, rounds, tokens, temperature)
    result = {**bench_job.bench(loaded, contenders, protocol, command, console, kept), "skipped": skipped}
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
