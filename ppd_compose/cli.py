"""`ppd-compose`: the commands, their options and what they print.

Knows typer and rich. Each command only reads its options and calls a function of the library.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .loading import DTYPES, load_base

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help="Composable speculative decoding.")
train = typer.Typer(no_args_is_help=True, help="Train drafters on a base model's own replies.")
app.add_typer(train, name="train")
console = Console(stderr=True)

BaseOption = Annotated[str, typer.Option(help="Folder or Hub id of the base; 'demo' is SmolLM2-135M-Instruct.")]
DtypeOption = Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")]


def main() -> None:
    """Run a command; what the user can mend is told in one line, without a traceback."""
    try:
        app(standalone_mode=False)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        console.print("[yellow]interrupted[/]")
        sys.exit(130)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        console.print(f"[red]{type(error).__name__}:[/] {error}", highlight=False)
        sys.exit(1)


@train.command("ppd")
def train_prompt_tokens(
    prompts: Annotated[Path, typer.Option(help="JSON lines with \"prompt\" or \"turns\".")],
    out: Annotated[Path, typer.Option(help="Adapter folder to write.")],
    base: BaseOption = "demo",
    dtype: DtypeOption = "bfloat16",
    num_prompt_tokens: Annotated[int, typer.Option(help="n: how many tokens ahead are guessed.")] = 3,
    ensemble: Annotated[int, typer.Option(help="v: embeddings of each prompt token.")] = 1,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 1500,
    batch_size: Annotated[int, typer.Option(help="Replies in one step.")] = 1,
    points: Annotated[int, typer.Option(help="Insertion points in each reply.")] = 96,
    learning_rate: Annotated[float, typer.Option(help="Peak of the cosine schedule.")] = 1e-2,
    max_length: Annotated[int, typer.Option(help="Tokens of prompt and reply that are used.")] = 512,
    held_out: Annotated[int, typer.Option(help="Prompts kept for the accuracies.")] = 64,
    reply_tokens: Annotated[int, typer.Option(help="Longest reply.")] = 160,
    reply_batch: Annotated[int, typer.Option(help="Replies generated at once.")] = 32,
    seed: Annotated[int, typer.Option(help="Same seed, same file.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    data: Annotated[str, typer.Option(help="Where the prompts come from, for the card.")] = "",
) -> None:
    """Train prompt tokens (Parallel Prompt Decoding) and write them as an adapter. Interrupted, it resumes."""
    from .prompts import read_prompts
    from .train import Recipe
    from .train_job import train_ppd

    asked = read_prompts(prompts)
    recipe = Recipe(
        num_prompt_tokens, ensemble, steps, batch_size, points, max_length, learning_rate,
        seed=seed, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    loaded = load_base(base, dtype)
    prompt = train_ppd(
        loaded.model, loaded.tokenizer, asked, out, recipe, base_name=loaded.name, held_out=held_out,
        reply_tokens=reply_tokens, reply_batch=reply_batch, command=_command(), data=data,
    )  # fmt: skip
    first = "/".join(f"{row[0]:.2f}" for row in prompt.accuracy)
    console.print(f"adapter in {out}; top-1 by distance {first} on held-out replies")


def _command() -> str:
    """This command as it was typed, without the folders of this machine."""
    words = [Path(word).name if "/" in word and Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["ppd-compose", *words])
