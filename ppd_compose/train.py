"""Training of prompt tokens: where a run starts, what a batch is, and how well the rows guess at the end.

The run itself is `loop`, the loss `distill`, the files of an adapter `adapter`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .adapter import check_counts
from .distill import Batch, Guessed, PromptRows
from .prefix import MOST, in_eight_bits, prefix_shape
from .replies import Reply
from .training_loop import (
    Recipe,
    Taught,
    dice_of,
    draw_points,
    frozen,
    points_of,
    replies_of_batch,
    run,
    usable,
    within_window,
)

RANKS = 10


@dataclass(frozen=True)
class PromptRecipe(Recipe):
    """What decides the trained rows."""

    num_prompt_tokens: int = 3
    ensemble: int = 1
    prefix: int = 0  # keys and values of each layer that prompt tokens alone see
    may_be_zero: ClassVar[tuple[str, ...]] = (*Recipe.may_be_zero, "prefix")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self.num_prompt_tokens, self.ensemble)
        if self.prefix > MOST:
            raise ValueError(f"prefix must be at most {MOST}, got {self.prefix}: no file of prompt tokens holds more")


@dataclass(frozen=True)
class Trained:
    """Trained rows `[n, v, hidden]`, their prefix `[layers, 2, key heads, columns, head_dim]` where there is one, both
    in the base's dtype and the latter of numbers that eight bits hold, and accuracies `[n][rank]`: how often the token
    at that distance was the guess of that rank, on held-out replies."""

    embeddings: Tensor
    prefix: Tensor | None
    accuracy: list[list[float]]


def train_prompt_tokens(
    base: PreTrainedModel,
    replies: Sequence[Reply],
    held_out: Sequence[Reply],
    recipe: PromptRecipe,
    checkpoints: Path,
    start: PromptRows | None = None,
) -> Trained:
    """Distil `base` into prompt tokens on its own `replies`, resuming from the newest of `checkpoints`.

    Training begins at `start`, or where `first_rows` says, which see for what is refused.

    The base is frozen for the duration and left as it was; of several processes each moves it to its device. The same
    recipe, replies and machine give the same rows, whether or not the run was interrupted.
    Raises `ValueError` when no reply, or none held out, is long enough.
    """
    rows = first_rows(base, recipe) if start is None else start
    recipe = within_window(recipe, base, recipe.num_prompt_tokens)
    mine = usable(replies, recipe, recipe.num_prompt_tokens)
    usable(held_out, recipe, recipe.num_prompt_tokens)  # else all accuracies, which gains are made of, would be 0

    def step(rows: PromptRows, number: int) -> Taught:
        batch = make_batch(replies_of_batch(mine, recipe, number), recipe, number).to(base.device)
        guessed: Guessed = rows(base, batch, recipe.decay)
        return guessed.told()

    with frozen(base):
        rows = run(rows.to(base.device), recipe, checkpoints, mine, step)
        embeddings, prefix = _as_stored(rows, base)
        rows = PromptRows(embeddings, prefix).to(base.device)
        return Trained(embeddings, prefix, evaluate(base, rows, held_out, recipe))


def _as_stored(rows: PromptRows, base: Any) -> tuple[Tensor, Tensor | None]:
    """What was trained, on the host, rounded as the base computes with it; a prefix to what eight bits hold, which is
    as good and makes files small."""
    embeddings = rows.embeddings.detach().to("cpu", base.dtype)
    return embeddings, None if rows.prefix is None else in_eight_bits(rows.prefix.detach().to("cpu", base.dtype))


def first_rows(
    base: Any, recipe: PromptRecipe, embeddings: Tensor | None = None, prefix: Tensor | None = None
) -> PromptRows:
    """Where a training begins: at `embeddings` `[n, v, hidden]`, else near the mean of the base's, and at `prefix`
    `[layers, 2, key heads, columns, head_dim]`, else at one that says nothing.

    Raises `ValueError` when either has another shape than the recipe, or the base takes no prefix.
    """
    shape = (recipe.num_prompt_tokens, recipe.ensemble)
    if embeddings is not None and embeddings.shape[:2] != shape:
        raise ValueError(
            f"training was to start from {tuple(embeddings.shape[:2])} embeddings, the recipe wants {shape}"
        )
    if prefix is not None and prefix.shape[3] != recipe.prefix:
        raise ValueError(f"training was to start from a prefix of {prefix.shape[3]}, the recipe wants {recipe.prefix}")
    return PromptRows(
        initial_embeddings(base, recipe) if embeddings is None else embeddings,
        initial_prefix(base, recipe) if prefix is None else prefix,
    )


def initial_embeddings(base: Any, recipe: PromptRecipe) -> Tensor:
    """Rows near the mean of the base's embeddings `[n, v, hidden]` float32, from the seed alone."""
    weight: Tensor = base.get_input_embeddings().weight.detach().float().cpu()
    dice = torch.Generator("cpu").manual_seed(recipe.seed)
    noise = torch.randn(recipe.num_prompt_tokens, recipe.ensemble, weight.shape[1], generator=dice, device="cpu")
    return weight.mean(0) + 0.1 * weight.std() * noise


def initial_prefix(base: Any, recipe: PromptRecipe) -> Tensor | None:
    """Small keys and no values for the layers that keep the whole context `[layers, 2, key heads, recipe.prefix,
    head_dim]` float32, from the seed alone; None where the recipe asks for none.

    Raises `ValueError` for a base that takes no prefix.
    """
    if not recipe.prefix:
        return None
    dice = torch.Generator("cpu").manual_seed(recipe.seed)
    prefix = 0.5 * torch.randn(prefix_shape(base, recipe.prefix), generator=dice, device="cpu")
    prefix[:, 1] = 0.0
    return prefix


def make_batch(replies: Sequence[Reply], recipe: PromptRecipe, number: int) -> Batch:
    """Pad `replies` and draw up to `recipe.points` insertion points in each, from the seed and `number`."""
    dice = dice_of(recipe, number)
    ids = [torch.tensor(reply.ids[: recipe.max_length], device="cpu") for reply in replies]
    drawn = [draw_points(reply, recipe, recipe.num_prompt_tokens, dice) for reply in replies]
    pad = torch.nn.utils.rnn.pad_sequence
    return Batch(pad(ids, batch_first=True), pad(drawn, batch_first=True, padding_value=-1))


@torch.no_grad()
def evaluate(
    base: PreTrainedModel, rows: PromptRows, replies: Sequence[Reply], recipe: PromptRecipe
) -> list[list[float]]:
    """Accuracy by distance and rank `[n][10]` on `replies`, at up to `recipe.points` points of each."""
    n = recipe.num_prompt_tokens
    hits = torch.zeros(n, RANKS, dtype=torch.float64, device="cpu")
    seen = 0
    for number, reply in enumerate(r for r in replies if points_of(r, recipe, n)):
        batch = make_batch([reply], recipe, number).to(base.device)
        guessed = rows(base, batch, recipe.decay)
        top = guessed.log_probs.topk(RANKS).indices
        hits += (top == guessed.truth[..., None]).sum(0).cpu()
        seen += len(top)
    return (hits / max(seen, 1)).tolist()
