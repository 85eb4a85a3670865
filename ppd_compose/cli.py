"""`ppd-compose`: the commands, their options and what they print.

Knows typer and rich. Each command only reads its options and calls a function of the library.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .drafters import load_drafter
from .hub_commands import convert, pull, push
from .loading import load_base
from .options import (
    AllTurnsOption,
    BaseOption,
    CompileOption,
    CountOption,
    DeviceOption,
    DraftersOption,
    DtypeOption,
    EagerOption,
    GenerateWithOption,
    JsonOption,
    LengthOption,
    ListingOption,
    PackedOption,
    QuestionsOption,
    RegionsOption,
    RowsOption,
    VersionOption,
    command_line,
    compiling,
)
from .packed import can_pack
from .plugins import TRAINING, installed
from .shipped import QUESTIONS

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False,
    help="Composable speculative decoding for Hugging Face models.",
)  # fmt: skip
train = typer.Typer(no_args_is_help=True, help="Train drafters on a base model's own replies.")
app.add_typer(train, name="train")
for kind, trainer in installed(TRAINING).items():
    train.command(kind)(trainer)
console = Console(stderr=True)

MENDABLE = (OSError, ValueError, TypeError, RuntimeError, ImportError)  # the last: of packages that files need
INTERRUPTED, MISTYPED = 130, 2  # the first as a shell reports Ctrl-C
UsageError: Any = typer.BadParameter.__base__  # of every mistyped command; typer gives it no public name
QUESTION = "Explain in a few short paragraphs why the sky is blue and why sunsets are red."


@app.callback()
def common(version: VersionOption = False) -> None:
    """Options of no command."""


def main() -> None:
    """Run a command; what the user can mend is told without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # an answer may hold what a terminal's or a file's encoding does not
            stream.reconfigure(errors="replace")
    try:
        code = app(standalone_mode=False)  # an exit code, where typer ended the command itself
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except UsageError as error:
        error.show()
        code = MISTYPED
    except MENDABLE as error:
        console.print(Text.assemble((f"{type(error).__name__}:", "red"), " ", str(error)), soft_wrap=True)
        code = 1
    if code == INTERRUPTED:
        console.print("[yellow]interrupted[/]")
    sys.exit(code or 0)


def drafters_of(listing: str) -> list[Any]:
    """The drafters of a listing such as "ppd+lookup"; "none" stands for no drafter."""
    return [load_drafter(part) for part in listing.split("+") if part != "none"]


@app.command()
def demo(
    base: BaseOption = "demo",
    drafters: ListingOption = "ppd",
    question: Annotated[str, typer.Option(help="What to ask.")] = QUESTION,
    max_new_tokens: LengthOption = 160,
    dtype: DtypeOption = "bfloat16",
    device: DeviceOption = "cpu",
    packed: Annotated[bool, typer.Option(help="Pack weights for the CPU, where it has the kernels.")] = True,
    compile: CompileOption = False,
    regions: RegionsOption = False,
) -> None:
    """Stream an answer with guessed tokens coloured, then compare with plain generate."""
    from .demo import demo as show

    loaded = load_base(base, dtype, device)
    console.print(Text(f"base: {loaded.origin}", "dim"), soft_wrap=True)
    out = Console(highlight=False)
    way = {"packed": packed and can_pack(loaded.model), "compile": compiling(compile, regions)}
    show(loaded, drafters_of(drafters), question, max_new_tokens, out, way)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask, as one user turn.")],
    base: BaseOption = "demo",
    drafters: ListingOption = "ppd",
    max_new_tokens: LengthOption = 256,
    sample: Annotated[bool, typer.Option(help="Sample instead of taking the likeliest token.")] = False,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Sample at this temperature; 0 is greedy. With --sample alone 1.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    rows: RowsOption = None,
    dtype: DtypeOption = "bfloat16",
    device: DeviceOption = "cpu",
    packed: PackedOption = False,
    compile: CompileOption = False,
    regions: RegionsOption = False,
) -> None:
    """Write the answer to standard output as it is decoded, and what it took to standard error."""
    from .compose import compose
    from .streamed import stream_answer

    loaded = load_base(base, dtype, device)
    heat = temperature if temperature is not None else float(sample)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": heat} if heat else {"do_sample": False}
    how = compiling(compile, regions)
    model = compose(loaded.model, *drafters_of(drafters), budget=rows, packed=packed, compile=how)
    stats = stream_answer(model, loaded.tokenizer, prompt, max_new_tokens, seed, sampling)
    console.print(f"[dim]{stats.tokens} tokens, {stats.tokens_per_forward:.2f} per forward[/]", highlight=False)


@app.command()
def plugins(drafters: ListingOption = "ppd") -> None:
    """List the drafters that are installed, and what a composition with one loads, with the hooks of each."""
    from .compose import composition

    kinds = Table("drafter", "class", title="installed drafters")
    for name, kind in sorted(installed().items()):
        kinds.add_row(Text(name), Text(f"{kind.__module__}.{kind.__name__}"))
    hooks = Table("plugin", "hooks", title="what compose(base, drafter) loads, in the order of registration")
    loaded = composition(drafters_of(drafters), [])
    for name, plugin in loaded.manager.list_name_plugin():
        hooks.add_row(Text(name), ", ".join(sorted(loaded.hooks_of(plugin))))
    Console().print(kinds, hooks)


@app.command()
def bench(
    questions: QuestionsOption = None,
    per_category: CountOption = None,
    max_new_tokens: LengthOption = 128,
    drafters: DraftersOption = None,
    generate_with: GenerateWithOption = None,
    rounds: Annotated[int, typer.Option(min=1, help="A question counts the medians of its rounds.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of sampling; 0 is greedy.")] = 0.0,
    all_turns: AllTurnsOption = False,
    rows: RowsOption = None,
    json_file: JsonOption = None,
    base: BaseOption = "demo",
    dtype: DtypeOption = "bfloat16",
    device: DeviceOption = "cpu",
    eager: EagerOption = False,
    packed: PackedOption = False,
    compile: CompileOption = False,
    regions: RegionsOption = False,
) -> None:
    """Time base and compositions interleaved on the same questions; the last line of standard output is JSON."""
    from . import bench_job
    from .bench import Protocol, greedy
    from .prompts import read_prompts
    from .questions import questions_from

    prompts = read_prompts(questions or QUESTIONS)
    loaded = load_base(base, dtype, device)
    wanted = {"eager": eager, "packed": packed, "compiled": compile, "regions": regions}
    ways = [way for way, asked_for in wanted.items() if asked_for]
    ask = partial(questions_from, prompts, loaded.tokenizer, per_category)
    later = partial(ask, partial(greedy, loaded.model, max_new_tokens=max_new_tokens)) if all_turns else None
    others = bench_job.plain(loaded, generate_with or [])

    def contenders() -> dict[str, Any]:
        listings = {listing: partial(drafters_of, listing) for listing in drafters or ["ppd"]}
        return bench_job.composed(loaded, listings, ways or ["eager"], rows, console) | others

    protocol = Protocol(ask(), rounds, max_new_tokens, temperature, all_turns)
    told = bench_job.bench(loaded, contenders, protocol, command_line(), console, json_file, later=later)
    print(json.dumps(told))


@app.command()
def profile(
    base: BaseOption = "demo",
    drafters: ListingOption = "ppd",
    questions: QuestionsOption = None,
    max_new_tokens: LengthOption = 64,
    dtype: DtypeOption = "bfloat16",
    device: DeviceOption = "cpu",
    packed: PackedOption = False,
    compile: CompileOption = False,
    regions: RegionsOption = False,
    again: Annotated[bool, typer.Option("--again", help="Measure anew what is kept in the user's cache.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw the curves there: .png, .svg or .pdf.")] = None,
) -> None:
    """Measure what forwards cost by rows and context and what a step takes; the last line is JSON."""
    from . import profile as profiling
    from .compose import compose
    from .prompts import read_prompts
    from .questions import questions_from

    if plot is not None:
        profiling.refuse_plot(plot)
    loaded = load_base(base, dtype, device)
    model = compose(loaded.model, *drafters_of(drafters), packed=packed, compile=compiling(compile, regions))
    asked = questions_from(read_prompts(questions or QUESTIONS), loaded.tokenizer, 1)
    told = profiling.profile(model, asked, max_new_tokens, again, command_line())
    profiling.show(told, console)
    print(json.dumps(told), flush=True)
    if plot is not None:
        profiling.plot(told, plot)


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="Files that bench --json wrote.")],
    out: Annotated[Path, typer.Option(help="Page to write.")] = Path("report.html"),
) -> None:
    """Write benchmark results as one self-contained page."""
    from .report import write_report

    write_report(results, out)
    print(out)


for command in (push, pull, convert):
    app.command()(command)
