"""`ppd-compose train ppd`: its options, and what it prints.

Knows typer. The training is `train_job`, which is imported only when the command runs.
"""

from __future__ import annotations

from typing import Annotated

import typer

from . import options
from .loading import load_base


def command(
    prompts: options.PromptsOption,
    out: options.OutOption,
    base: options.BaseOption = "demo",
    dtype: options.DtypeOption = "bfloat16",
    num_prompt_tokens: Annotated[int, typer.Option(help="n: how many tokens ahead are guessed.")] = 3,
    ensemble: Annotated[int, typer.Option(help="v: embeddings of each prompt token.")] = 1,
    prefix: Annotated[
        int,
        typer.Option(
            help="Keys and values of each layer with the whole context, which prompt tokens alone see; 0: none."
        ),
    ] = 1,
    steps: options.StepsOption = 1500,
    batch_size: options.BatchOption = 1,
    points: options.PointsOption = 96,
    learning_rate: options.RateOption = 1e-2,
    max_length: options.MaxLengthOption = 512,
    held_out: options.HeldOutOption = 64,
    reply_tokens: options.ReplyTokensOption = 160,
    reply_batch: options.ReplyBatchOption = 32,
    seed: options.SeedOption = 0,
    checkpoint_every: options.CheckpointOption = 100,
    data: options.DataOption = "",
    start_from: Annotated[
        str | None, typer.Option(help="Prompt tokens to train further; else they start near the mean embedding.")
    ] = None,
    device: options.DeviceOption = "cpu",
) -> None:
    """Train prompt tokens (Parallel Prompt Decoding) and write them as an adapter. Interrupted, it resumes."""
    from .drafters import load_drafter
    from .prompt import PromptTokens
    from .prompts import read_prompts
    from .train import PromptRecipe
    from .train_job import train_ppd

    asked = read_prompts(prompts)
    recipe = PromptRecipe(
        steps, batch_size, points, max_length, learning_rate, seed=seed, checkpoint_every=checkpoint_every,
        num_prompt_tokens=num_prompt_tokens, ensemble=ensemble, prefix=prefix,
    )  # fmt: skip
    start = None if start_from is None else load_drafter(start_from)
    if not isinstance(start, PromptTokens | None):
        raise ValueError(f"--start-from {start_from} is {type(start).__name__}: prompt tokens go on from prompt tokens")
    loaded = load_base(base, dtype, device)
    prompt = train_ppd(
        loaded.model, loaded.tokenizer, asked, out, recipe, base_name=loaded.name, held_out=held_out,
        reply_tokens=reply_tokens, reply_batch=reply_batch, command=options.command_line(), data=data,
        start=start,
    )  # fmt: skip
    first = "/".join(f"{row[0]:.2f}" for row in prompt.accuracy)
    typer.echo(f"adapter in {out}; top-1 by distance {first} on held-out replies", err=True)
