"""Training of a draft model to guess several tokens in one forward by a shared prompt token (PARD, arXiv 2504.18583).

Knows the rows, the mask and the loss. The run itself is the core's loop, files and the order of things are `train_job`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppd_compose.distill import insertion_mask
from ppd_compose.mask import Attention
from ppd_compose.replies import Reply
from ppd_compose.training_loop import (
    Recipe,
    Taught,
    dice_of,
    draw_points,
    points_of,
    replies_of_batch,
    run,
    usable,
    within_window,
)

ALL, TOKEN = "all", "token"


@dataclass(frozen=True)
class PardRecipe(Recipe):
    """What decides the trained weights."""

    tokens: int = 8  # guessed in one forward: the next one, and one for each of `tokens - 1` shared prompt tokens
    retained: float = 0.7  # of the points with one more distance ahead (PARD, conditional drop token)
    least: float = 0.2  # of all points, at every distance
    weights: str = ALL  # or TOKEN: the embedding of the shared prompt token alone

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 2:
            raise ValueError(f"tokens must be at least 2, got {self.tokens}: one is what every model guesses")
        if not (0 < self.retained <= 1 and 0 <= self.least <= 1):
            raise ValueError(f"retained and least are shares of the points, got {self.retained} and {self.least}")
        if self.weights not in (ALL, TOKEN):
            raise ValueError(f"weights must be {ALL!r} or {TOKEN!r}, got {self.weights!r}")


@dataclass(frozen=True)
class PardBatch:
    """Sequences `ids` `[batch, length]` int64, padded at the right; `points` `[batch, count]` int64, after which shared
    prompt tokens stand, -1 for padding; `reach` `[count]` int64, how many of them after the points of a column."""

    ids: Tensor
    points: Tensor
    reach: Tensor

    def to(self, device: torch.device) -> PardBatch:
        """The same on `device`."""
        return PardBatch(self.ids.to(device), self.points.to(device), self.reach.to(device))


class ParallelDraft(nn.Module):
    """A draft model that learns to guess at the rows of one shared prompt token.

    Args:
        draft: trained in place, in float32.
        token: the id that becomes the shared prompt token.
        recipe: of it, how many tokens are guessed and which weights are trained.
    """

    def __init__(self, draft: PreTrainedModel, token: int, recipe: PardRecipe) -> None:
        super().__init__()
        self.draft, self.token, self.recipe = draft, token, recipe
        draft.requires_grad_(recipe.weights == ALL)
        if recipe.weights == TOKEN:
            module: Any = draft.get_input_embeddings()
            module.weight.requires_grad_(True)
            module.weight.register_hook(self._of_the_token)

    def _of_the_token(self, gradient: Tensor) -> Tensor:
        alone = torch.zeros_like(gradient)
        alone[self.token] = gradient[self.token]
        return alone

    def forward(self, batch: PardBatch) -> Taught:
        """Cross entropy of what the sequences hold, averaged over the points of each distance and summed over distances
        with weights `decay ** distance`; distance 0 is the draft model's own next token.

        Loss and shares are on the draft model's device; a share is that of the points, of all sequences, where the
        best guess was right `[tokens]`.
        """
        n = self.recipe.tokens - 1
        rows = (torch.arange(n, device=batch.ids.device) < batch.reach[:, None]).flatten().nonzero()[:, 0]
        at = batch.points.clamp(min=0)
        below = (at[..., None] + 1 + torch.arange(n, device=at.device)).flatten(1)[:, rows]
        log_probs = self._log_probs(batch, at, below, rows).log_softmax(-1)
        truth = batch.ids.gather(1, torch.cat([at, below], dim=1) + 1)
        real = batch.points >= 0
        real = torch.cat([real, real.repeat_interleave(n, dim=1)[:, rows]], dim=1)
        distance = torch.cat([torch.zeros_like(batch.reach), rows % n + 1]).expand_as(real)[real]
        missed = -log_probs.gather(2, truth[..., None])[..., 0][real]
        right = (log_probs.detach().argmax(-1) == truth)[real].float()
        weights = self.recipe.decay ** torch.arange(n + 1, device=missed.device)
        return Taught((_means(missed, distance, n + 1) * weights).sum() / weights.sum(), _means(right, distance, n + 1))

    def _log_probs(self, batch: PardBatch, at: Tensor, below: Tensor, rows: Tensor) -> Tensor:
        """Logits `[batch, count + rows, vocab]` float32 at the points, and at the rows of the shared prompt token."""
        (size, length), device = batch.ids.shape, batch.ids.device
        see = insertion_mask(batch.points, length, self.recipe.tokens - 1, 1)[:, rows]
        see = torch.cat([see[..., :length], see[..., length + rows]], dim=-1)
        causal = torch.ones(length, length + len(rows), dtype=torch.bool, device=device).tril()
        see = torch.cat([causal.expand(size, -1, -1), see], dim=1)
        shared = batch.ids.new_full((size, len(rows)), self.token)
        keep, where = at.unique(return_inverse=True)
        logits = self.draft(
            input_ids=torch.cat([batch.ids, shared], dim=1),
            attention_mask=Attention.of(self.draft).mask(see[:, None]),
            position_ids=torch.cat([torch.arange(length, device=device).expand(size, -1), below], dim=1),
            use_cache=False,
            logits_to_keep=torch.cat([keep, length + torch.arange(len(rows), device=device)]),
        ).logits.float()
        own = logits[torch.arange(size, device=device)[:, None], where]
        return torch.cat([own, logits[:, len(keep) :]], dim=1)


def train_parallel(
    draft: PreTrainedModel,
    token: int,
    replies: Sequence[Reply],
    held_out: Sequence[Reply],
    recipe: PardRecipe,
    checkpoints: Path,
) -> list[float]:
    """Train `draft` in place on a base's own `replies`, resuming from the newest of `checkpoints`.

    The same recipe, replies and machine give the same weights, whether or not the run was interrupted. Returns by
    distance how often the best guess was right on held-out replies. Raises `ValueError` when no reply is long enough.
    """
    recipe = within_window(recipe, draft, recipe.tokens - 1)
    mine = usable(replies, recipe, recipe.tokens - 1)

    def step(module: ParallelDraft, number: int) -> Taught:
        taught: Taught = module(make_batch(replies_of_batch(mine, recipe, number), recipe, number).to(draft.device))
        return taught

    # Without dropout: an interrupted run must come to the same weights.
    module = run(ParallelDraft(draft.eval(), token, recipe), recipe, checkpoints, mine, step, {"token": token})
    return evaluate(module, held_out, recipe)


def make_batch(replies: Sequence[Reply], recipe: PardRecipe, number: int) -> PardBatch:
    """Pad `replies`, draw up to `recipe.points` points in each, and drop distances: of the points with one more token
    ahead a share of `retained` has a further one, down to `least` of all. From the seed and `number` alone."""
    dice = dice_of(recipe, number)
    ids = [torch.tensor(reply.ids[: recipe.max_length], device="cpu") for reply in replies]
    drawn = [draw_points(reply, recipe, recipe.tokens - 1, dice) for reply in replies]
    pad = torch.nn.utils.rnn.pad_sequence
    points = pad(drawn, batch_first=True, padding_value=-1)
    place = torch.randperm(points.shape[1], generator=dice, device="cpu")
    shares = [max(recipe.retained**i, recipe.least) for i in range(recipe.tokens - 1)]
    wanted = (torch.tensor(shares, device="cpu") * points.shape[1]).ceil()
    reach = (place[:, None] < wanted).sum(1)
    return PardBatch(pad(ids, batch_first=True), points, reach)


@torch.no_grad()
def evaluate(module: ParallelDraft, replies: Sequence[Reply], recipe: PardRecipe) -> list[float]:
    """By distance how often the best guess was right `[tokens]`, at up to `recipe.points` points of each reply."""
    whole = replace(recipe, retained=1.0)
    shares = [
        module(make_batch([reply], whole, number).to(module.draft.device)).top1
        for number, reply in enumerate(r for r in replies if points_of(r, recipe, recipe.tokens - 1))
    ]
    return [] if not shares else [float(share) for share in torch.stack(shares).mean(0)]


def _means(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """The mean of the `values` of each group `[groups]`, 0 for one without values."""
    member = nn.functional.one_hot(group, groups).to(values)
    return values @ member / member.sum(0).clamp(min=1)
