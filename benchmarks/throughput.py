"""Tokens per second against the base's own generate: compositions, and what people use now, in one run.

With --json, a run that is cut off goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from peers import GGUF_NAME, LONGEST, MAKERS, Files, peers, unlearnt
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from ppd_compose import bench_job
from ppd_compose.bench import Protocol, greedy
from ppd_compose.cli import drafters_of
from ppd_compose.loading import load_base
from ppd_compose.options import AllTurnsOption
from ppd_compose.packed import can_pack
from ppd_compose.prompts import read_prompts
from ppd_compose.questions import Question, questions_from
from ppd_compose.shipped import QUESTIONS

QUICK = {"per_category": 2, "tokens": 48, "rounds": 5}
console = Console(stderr=True)


def main(
    questions: Annotated[Path, typer.Option(help="JSON lines, as of Spec-Bench; ours when left out.")] = QUESTIONS,
    drafters: Annotated[list[str] | None, typer.Option(help="Joined by '+'. Repeatable.")] = None,
    ways: Annotated[str, typer.Option(help="eager, packed, compiled, joined by '+'; what suits the device.")] = "",
    peer: Annotated[list[str] | None, typer.Option(help="A peer by name, or 'all'. Repeatable.")] = None,
    gguf: Annotated[Path, typer.Option(help="The base's GGUF, for llama.cpp.")] = Path(GGUF_NAME),
    assistant: Annotated[str, typer.Option(help="A smaller model, for transformers' assisted generation.")] = "",
    per_category: Annotated[int, typer.Option(help="Questions of each category.")] = 10,
    tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    rounds: Annotated[int, typer.Option(help="A question counts its median.")] = 3,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    all_turns: AllTurnsOption = False,
    base: Annotated[str, typer.Option(help="Folder, Hub id, or 'demo'.")] = "demo",
    dtype: str = "bfloat16",
    device: str = "cpu",
    int8: Annotated[bool, typer.Option("--int8", help="Weights in eight bits (torchao), everyone's alike.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A few questions, in a few minutes.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result there.")] = None,
) -> None:
    """Print a table, and as the last line the result as JSON."""
    if quick:
        per_category, tokens, rounds = QUICK["per_category"], QUICK["tokens"], QUICK["rounds"]
    prompts = read_prompts(questions)
    loaded = load_base(base, dtype, device)
    if int8:
        to_eight_bits(loaded.model)
    listings = drafters or ["ppd+ngram+recycling+lookup"]
    ways = ways or ("packed" if can_pack(loaded.model) else "eager")
    others: dict[str, Any] = {}
    skipped = {}
    for name, made, reason in peers(loaded, chosen(peer), Files(gguf, assistant), bool(temperature)):
        if made is None:
            skipped[name] = reason
            console.print(f"[yellow]skipped {name}:[/] {escape(reason)}", highlight=False)
        else:
            others[name] = made

    def asked(answer: Callable[[Tensor], list[int]] | None = None) -> list[Question]:
        made = questions_from(prompts, loaded.tokenizer, per_category, answer)
        return [question for question in made if not peer or question.ids.shape[1] + tokens <= LONGEST]

    def contenders() -> dict[str, Any]:
        makers = {name: partial(drafters_of, name) for name in listings}
        made = bench_job.composed(loaded, makers, ways.split("+"), None, console)
        return made | {name: unlearnt(peer) for name, peer in others.items()}

    words = [f"--drafters {listing}" for listing in listings] + [f"--peer {name!r}" for name in peer or []]
    command = (
        f"python benchmarks/throughput.py --questions {questions.name} {' '.join(words)} --ways {ways} --per-category "
        f"{per_category} --tokens {tokens} --rounds {rounds} --temperature {temperature:g} --base {loaded.name} "
        f"--dtype {dtype} --device {device}{' --all-turns' if all_turns else ''}{' --int8' if int8 else ''}"
        f"{f' --assistant {Path(assistant).name}' if assistant else ''}"
    )
    protocol = Protocol(asked(), rounds, tokens, temperature, all_turns)
    later = partial(asked, partial(greedy, loaded.model, max_new_tokens=tokens)) if all_turns else None
    print(json.dumps(bench_job.bench(loaded, contenders, protocol, command, console, json_file, skipped, later)))


def to_eight_bits(model: Any) -> None:
    """Keep the weights of linear layers in eight bits; activations stay as they are."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise typer.BadParameter(f"--int8 needs torchao: pip install torchao ({error})") from None
    quantize_(model, Int8WeightOnlyConfig(version=2))


def chosen(asked_for: list[str] | None) -> list[str]:
    """The names of peers; one that is unknown is refused."""
    if asked_for == ["all"]:
        return list(MAKERS)
    if unknown := set(asked_for or []) - set(MAKERS):
        raise typer.BadParameter(f"{sorted(unknown)} are no peers: take some of {', '.join(MAKERS)}, or all")
    return asked_for or []


if __name__ == "__main__":
    typer.run(main)
