"""What does training buy? Accuracy on held-out replies against seconds, for the drafters that are trained.

Every number of steps is a training of its own, as the learning rate falls to zero at its end; of n-gram tables, which
take no steps, it is the number of replies counted. Replies are made beforehand and do not count.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from ppd_compose.integrations.eagle.initial import EagleRecipe
from ppd_compose.integrations.eagle.train import train_head
from ppd_compose.integrations.medusa.train import MedusaRecipe, train_heads
from ppd_compose.integrations.ngram.train import NGramRecipe, counted_table, evaluate
from rich.console import Console

from ppd_compose.environment import environment
from ppd_compose.loading import load_base
from ppd_compose.prompts import read_prompts
from ppd_compose.replies import Reply
from ppd_compose.train import PromptRecipe, train_prompt_tokens
from ppd_compose.train_job import split_replies

Replies = Sequence[Reply]
console = Console(stderr=True)


def prompt_tokens(base: Any, replies: Replies, held: Replies, amount: int, folder: Path) -> Any:
    """Accuracy of prompt tokens by distance and rank."""
    recipe = PromptRecipe(amount, 1, 96, learning_rate=1e-2, num_prompt_tokens=3)
    return train_prompt_tokens(base, replies, held, recipe, folder).accuracy


def medusa(base: Any, replies: Replies, held: Replies, amount: int, folder: Path) -> Any:
    """Accuracy of Medusa heads by head and rank."""
    return train_heads(base, replies, held, MedusaRecipe(amount), folder)[1].accuracy


def eagle(base: Any, replies: Replies, held: Replies, amount: int, folder: Path) -> Any:
    """Accuracy of an EAGLE-3 head by depth, of its first guess."""
    return [[share] for share in train_head(base, replies, held, EagleRecipe(amount), folder).accuracy]


def ngram(base: Any, replies: Replies, held: Replies, amount: int, folder: Path) -> Any:
    """Accuracy of an n-gram table by rank."""
    return [evaluate(counted_table(replies[:amount], NGramRecipe()), held)]


KINDS: dict[str, Callable[[Any, Replies, Replies, int, Path], Any]] = {
    "ppd": prompt_tokens,
    "medusa": medusa,
    "eagle": eagle,
    "ngram": ngram,
}


def trained(kind: str, base: Any, replies: Replies, held: Replies, amounts: Sequence[int]) -> list[dict[str, Any]]:
    """Seconds and accuracy `[distance][rank]` of every amount of training."""
    told = []
    for amount in amounts:
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            accuracy = KINDS[kind](base, replies, held, amount, Path(folder) / "checkpoints")
            seconds = time.perf_counter() - begin
        first = [round(float(share), 3) for share in np.asarray(accuracy)[:, 0]]
        console.print(f"{kind} {amount}: {seconds:.0f} s, top-1 by distance {first}")
        told.append({"amount": amount, "seconds": seconds, "accuracy": np.asarray(accuracy).tolist()})
    return told


def main(
    prompts: Annotated[Path, typer.Option(help='JSON lines with "prompt" or "turns".')],
    kind: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(KINDS)}. Repeatable; all.")] = None,
    steps: Annotated[list[int] | None, typer.Option(help="Steps, or replies of n-gram tables. Repeatable.")] = None,
    base: Annotated[str, typer.Option(help="Folder, Hub id, or 'demo'.")] = "demo",
    dtype: str = "bfloat16",
    device: str = "cpu",
    held_out: int = 64,
    reply_tokens: int = 160,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result there.")] = None,
) -> None:
    """Print a line a training, and as the last line the result as JSON."""
    kinds, amounts = kind or list(KINDS), steps or [25, 50, 100, 200]
    if unknown := set(kinds) - set(KINDS):
        raise typer.BadParameter(f"{sorted(unknown)} cannot be trained here: take some of {', '.join(KINDS)}")
    loaded = load_base(base, dtype, device)
    replies, held = split_replies(
        loaded.model, loaded.tokenizer, read_prompts(prompts), held_out, reply_tokens, reply_batch=32
    )
    command = (
        f"python benchmarks/training.py --prompts {prompts.name} {' '.join(f'--kind {name}' for name in kinds)} "
        f"{' '.join(f'--steps {amount}' for amount in amounts)} --base {loaded.name} --dtype {dtype} --device {device}"
    )
    result = {
        "environment": environment(loaded.model, command),
        "replies": len(replies),
        "trainings": {name: trained(name, loaded.model, replies, held, amounts) for name in kinds},
    }
    if json_file:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
