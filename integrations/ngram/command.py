"""`ppd-compose train ngram`: its options, and what it prints.

Knows typer. The counting is `train`, which is imported only when the command runs.
"""

from __future__ import annotations

from typing import Annotated

import typer

from ppd_compose import options
from ppd_compose.loading import load_base


def command(
    prompts: options.PromptsOption,
    out: options.OutOption,
    base: options.BaseOption = "demo",
    dtype: options.DtypeOption = "bfloat16",
    order: Annotated[int, typer.Option(help="Tokens of the longest contexts.")] = 2,
    width: Annotated[int, typer.Option(help="Tokens kept after each context.")] = 8,
    least: Annotated[float, typer.Option(help="Chance below which none is kept.")] = 0.01,
    held_out: options.HeldOutOption = 64,
    reply_tokens: options.ReplyTokensOption = 160,
    reply_batch: options.ReplyBatchOption = 32,
    data: options.DataOption = "",
    device: options.DeviceOption = "cpu",
) -> None:
    """Count what the base says after its last few tokens, in its own replies. Interrupted, it resumes."""
    from ppd_compose.prompts import read_prompts

    from .train import NGramRecipe, train_ngram

    asked = read_prompts(prompts)
    recipe = NGramRecipe(order, width, least)
    loaded = load_base(base, dtype, device)
    made = train_ngram(
        loaded.model, loaded.tokenizer, asked, out, recipe, base_name=loaded.name, held_out=held_out,
        reply_tokens=reply_tokens, reply_batch=reply_batch, command=options.command_line(), data=data,
    )  # fmt: skip
    typer.echo(f"table in {out}; top-1 {made.accuracy[0]:.2f} on held-out replies", err=True)
