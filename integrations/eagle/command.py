"""`ppd-compose train eagle`: its options, and what it prints.

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
    unrolled: Annotated[int, typer.Option(help="Draft steps in a row that are trained (training-time test).")] = 4,
    vocabulary: Annotated[
        int, typer.Option(help="Tokens that can be drafted: the most frequent of the replies.")
    ] = 8192,
    variant: Annotated[
        str, typer.Option(help='"3" for EAGLE-3, "3.1" with its further norms, "1" for the layer of EAGLE-1.')
    ] = "3",
    decay: Annotated[float, typer.Option(help="Weight of the loss of each draft step against the one before.")] = 0.8,
    steps: options.StepsOption = 4000,
    warmup: Annotated[int, typer.Option(help="Steps in which the learning rate rises.")] = 100,
    batch_size: options.BatchOption = 1,
    points: options.PointsOption = 128,
    learning_rate: options.RateOption = 1e-3,
    max_length: options.MaxLengthOption = 512,
    held_out: options.HeldOutOption = 64,
    reply_tokens: options.ReplyTokensOption = 160,
    reply_batch: options.ReplyBatchOption = 32,
    seed: options.SeedOption = 0,
    checkpoint_every: options.CheckpointOption = 200,
    data: options.DataOption = "",
    start_from: Annotated[str | None, typer.Option(help="EAGLE head to train further.")] = None,
    device: options.DeviceOption = "cpu",
) -> None:
    """Train an EAGLE head, by EAGLE-3's loss, and write it in the official layout. Interrupted, it resumes."""
    from ppd_compose.prompts import read_prompts

    from .drafter import EagleHead
    from .initial import EagleRecipe
    from .train import train_eagle

    asked = read_prompts(prompts)
    recipe = EagleRecipe(
        steps, batch_size, points, max_length, learning_rate, warmup, decay, seed, checkpoint_every,
        unrolled, vocabulary, variant,
    )  # fmt: skip
    start = None if start_from is None else EagleHead.from_pretrained(start_from)
    loaded = load_base(base, dtype, device)
    drafter = train_eagle(
        loaded.model, loaded.tokenizer, asked, out, recipe, base_name=loaded.name, held_out=held_out,
        reply_tokens=reply_tokens, reply_batch=reply_batch, command=options.command_line(), data=data, start=start,
    )  # fmt: skip
    shares = "/".join(f"{share:.2f}" for share in drafter.head.accuracy)
    typer.echo(f"head in {out}; top-1 by depth {shares} on held-out replies", err=True)
