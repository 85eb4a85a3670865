"""`ppd-compose train medusa`: its options, and what it prints.

Knows typer. The training is `train`, which is imported only when the command runs.
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
    heads: Annotated[int, typer.Option(help="How many tokens beyond the next one are guessed.")] = 4,
    layers: Annotated[int, typer.Option(help="Residual blocks of each head.")] = 1,
    vocabulary: Annotated[int, typer.Option(min=0, help="Most frequent tokens to choose from; 0 is all.")] = 8192,
    kl: Annotated[float, typer.Option(help="Share of the base's own distribution in the loss, 0 to 1.")] = 0.5,
    decay: Annotated[float, typer.Option(help="Weight of a head's loss, as a share of that before it.")] = 0.8,
    steps: options.StepsOption = 1500,
    batch_size: options.BatchOption = 4,
    points: options.PointsOption = 128,
    learning_rate: options.RateOption = 3e-3,
    max_length: options.MaxLengthOption = 512,
    held_out: options.HeldOutOption = 64,
    reply_tokens: options.ReplyTokensOption = 160,
    reply_batch: options.ReplyBatchOption = 32,
    seed: options.SeedOption = 0,
    checkpoint_every: options.CheckpointOption = 100,
    data: options.DataOption = "",
    device: options.DeviceOption = "cpu",
) -> None:
    """Train Medusa heads on the base's own replies. Interrupted, it resumes."""
    from ppd_compose.prompts import read_prompts

    from .train import MedusaRecipe, train_medusa

    asked = read_prompts(prompts)
    recipe = MedusaRecipe(
        steps, batch_size, points, max_length, learning_rate, decay=decay, seed=seed,
        checkpoint_every=checkpoint_every, heads=heads, layers=layers, vocabulary=vocabulary or None, kl=kl,
    )  # fmt: skip
    loaded = load_base(base, dtype, device)
    made = train_medusa(
        loaded.model, loaded.tokenizer, asked, out, recipe, base_name=loaded.name, held_out=held_out,
        reply_tokens=reply_tokens, reply_batch=reply_batch, command=options.command_line(), data=data,
    )  # fmt: skip
    first = "/".join(f"{row[0]:.2f}" for row in made.accuracy) if made.accuracy is not None else ""
    typer.echo(f"heads in {out}; top-1 by head {first} on held-out replies", err=True)
