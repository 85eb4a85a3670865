"""`ppd-compose train pard`: its options, and what it prints.

Knows typer. The training is `train_job`, which is imported only when the command runs.
"""

from __future__ import annotations

from typing import Annotated

import typer

from ppd_compose import options
from ppd_compose.loading import load_base

# Peaks of the learning rate: PARD's for a whole model, and that of prompt tokens for a single embedding.
WHOLE, ALONE = 2e-5, 1e-2


def command(
    prompts: options.PromptsOption,
    out: options.OutOption,
    draft: Annotated[str, typer.Option(help="Folder or Hub id of the draft model to start from.")],
    base: options.BaseOption = "demo",
    dtype: options.DtypeOption = "bfloat16",
    token: Annotated[
        str | None, typer.Option(help="Id or text of a token that no text holds; an unused one when left out.")
    ] = None,
    only_token: Annotated[bool, typer.Option(help="Train that token's embedding alone.")] = False,
    tokens: Annotated[int, typer.Option(help="Tokens guessed in one forward.")] = 8,
    retained: Annotated[
        float,
        typer.Option(help="Share of the points at one distance that are trained at the next too."),
    ] = 0.7,
    steps: options.StepsOption = 1500,
    batch_size: options.BatchOption = 1,
    points: options.PointsOption = 96,
    learning_rate: Annotated[
        float | None, typer.Option(help=f"Peak of the cosine schedule; {WHOLE}, or {ALONE} with --only-token.")
    ] = None,
    max_length: options.MaxLengthOption = 512,
    held_out: options.HeldOutOption = 64,
    reply_tokens: options.ReplyTokensOption = 160,
    reply_batch: options.ReplyBatchOption = 32,
    seed: options.SeedOption = 0,
    checkpoint_every: options.CheckpointOption = 100,
    data: options.DataOption = "",
    device: options.DeviceOption = "cpu",
) -> None:
    """Train a draft model to guess several tokens in one forward (PARD). Interrupted, it resumes."""
    from ppd_compose.prompts import read_prompts

    from .train import ALL, TOKEN, PardRecipe
    from .train_job import train_pard

    asked = read_prompts(prompts)
    rate = learning_rate if learning_rate is not None else ALONE if only_token else WHOLE
    recipe = PardRecipe(
        steps, batch_size, points, max_length, rate, seed=seed, checkpoint_every=checkpoint_every,
        tokens=tokens, retained=retained, weights=TOKEN if only_token else ALL,
    )  # fmt: skip
    loaded = load_base(base, dtype, device)
    made = train_pard(
        loaded.model, loaded.tokenizer, draft, asked, out, recipe, token=token, base_name=loaded.name,
        held_out=held_out, reply_tokens=reply_tokens, reply_batch=reply_batch,
        command=options.command_line(), data=data,
    )  # fmt: skip
    first = "/".join(f"{share:.2f}" for share in made.accuracy)
    told = f"draft model in {out}, shared prompt token {made.token}; top-1 by distance {first} on held-out replies"
    typer.echo(told, err=True)
