"""`ppd-compose train prompt-heads`: its options, and what it prints.

Knows typer. The training is `train_medusa_prompt_heads`, which is imported only when the command runs.
"""

from __future__ import annotations

from typing import Annotated

import typer

from ppd_compose import options
from ppd_compose.loading import load_base


def command(
    prompts: options.PromptsOption,
    out: options.OutOption,
    medusa: Annotated[str, typer.Option(help="Medusa heads that the new ones are saved with.")] = "medusa",
    ppd: Annotated[str, typer.Option(help="Prompt tokens that the heads read.")] = "ppd",
    base: options.BaseOption = "demo",
    dtype: options.DtypeOption = "bfloat16",
    width: Annotated[int, typer.Option(help="Numbers between a head's two layers.")] = 192,
    kl: Annotated[float, typer.Option(help="Share of the base's own distribution in the loss, 0 to 1.")] = 0.5,
    decay: Annotated[float, typer.Option(help="Weight of a head's loss, as a share of that before it.")] = 0.8,
    steps: options.StepsOption = 1500,
    batch_size: options.BatchOption = 4,
    points: options.PointsOption = 128,
    learning_rate: options.RateOption = 2e-3,
    max_length: options.MaxLengthOption = 512,
    held_out: options.HeldOutOption = 64,
    reply_tokens: options.ReplyTokensOption = 160,
    reply_batch: options.ReplyBatchOption = 32,
    seed: options.SeedOption = 0,
    checkpoint_every: options.CheckpointOption = 100,
    data: options.DataOption = "",
    device: options.DeviceOption = "cpu",
) -> None:
    """Train heads that read prompt tokens, for Medusa heads and prompt tokens that are composed. Interrupted, it
    resumes."""
    from ppd_compose.drafters import load_drafter
    from ppd_compose.prompt import PromptTokens
    from ppd_compose.prompts import read_prompts

    from .drafter import MedusaHeads
    from .train_prompt_heads import PromptHeadsRecipe, train_medusa_prompt_heads

    asked = read_prompts(prompts)
    recipe = PromptHeadsRecipe(
        steps, batch_size, points, max_length, learning_rate, decay=decay, seed=seed,
        checkpoint_every=checkpoint_every, kl=kl, width=width,
    )  # fmt: skip
    heads, tokens = load_drafter(medusa), load_drafter(ppd)
    if not isinstance(heads, MedusaHeads) or not isinstance(tokens, PromptTokens):
        raise ValueError(
            f"--medusa {medusa} is {type(heads).__name__} and --ppd {ppd} {type(tokens).__name__}: give Medusa heads "
            "and prompt tokens"
        )
    loaded = load_base(base, dtype, device)
    made = train_medusa_prompt_heads(
        loaded.model, loaded.tokenizer, asked, out, heads, tokens, recipe, base_name=loaded.name,
        held_out=held_out, reply_tokens=reply_tokens, reply_batch=reply_batch, command=options.command_line(),
        data=data,
    )  # fmt: skip
    assert made.prompt_heads is not None
    first = "/".join(f"{row[0]:.2f}" for row in made.prompt_heads.facts["accuracy"])
    typer.echo(f"heads in {out}; top-1 by distance {first} on held-out replies", err=True)
