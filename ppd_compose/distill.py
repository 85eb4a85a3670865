"""The loss that teaches prompt tokens: the model's own distribution, at many insertion points of a sequence at once.

Knows the block mask, the rows, their prefix and the divergence. Does not know files, optimisers or progress bars.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from .cache import whole_context, with_cache
from .ensemble import average
from .mask import Attention, layered_mask
from .training_loop import Taught
from .verify import only_last, states_wanted

UNIT = 5.0  # keys and values are so much larger than embeddings; an optimiser moves all numbers by like steps


@dataclass(frozen=True)
class Batch:
    """Sequences `ids` `[batch, length]` int64, padded at the right, and where prompt tokens are inserted.

    `points` `[batch, count]` int64: a group of prompt tokens stands after each of these positions; -1 is padding.
    """

    ids: Tensor
    points: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.ids.to(device), self.points.to(device))


@dataclass(frozen=True)
class Guessed:
    """What prompt tokens said at the points of one batch, and what they should have said."""

    loss: Tensor  # scalar
    log_probs: Tensor  # [kept points, n, vocab] float32, of the prompt tokens
    truth: Tensor  # [kept points, n] int64, the tokens that the sequences hold there

    def told(self) -> Taught:
        """The loss, and in which share of the points the first guess was right."""
        return Taught(self.loss, (self.log_probs.argmax(-1) == self.truth).float().mean(0))


class PromptRows(nn.Module):
    """`n` prompt tokens of `v` embeddings each, trained through a frozen model, with keys and values of their own.

    The parameters are `embeddings` `[n, v, hidden]` and, where there is a prefix, `scaled` `[layers, 2, key heads,
    columns, head_dim]`, both float32. The base is no submodule, so that neither a checkpoint nor an optimiser takes it
    up.
    """

    def __init__(self, embeddings: Tensor, prefix: Tensor | None = None) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(embeddings.detach().clone().float())
        self.scaled = None if prefix is None else nn.Parameter(prefix.detach().float() / UNIT)

    @property
    def prefix(self) -> Tensor | None:
        """Keys and values that stand before the sequence for the rows of prompt tokens alone."""
        return None if self.scaled is None else self.scaled * UNIT

    def forward(self, base: PreTrainedModel, batch: Batch, decay: float) -> Guessed:
        """Sum over distances of `decay ** distance` times KL(model || prompt token) (PPD, equation 1)."""
        n = self.embeddings.shape[0]
        at = batch.points.clamp(min=0)[..., None] + 1 + torch.arange(n, device=batch.points.device)
        cache, teacher = _context(base, batch.ids, at)
        student = _prompt_log_probs(base, cache, self.embeddings, self.prefix, batch)
        kept = batch.points >= 0
        log_probs, target = student[kept], teacher[kept].float().log_softmax(-1)
        divergence = nn.functional.kl_div(log_probs, target, reduction="none", log_target=True).sum(-1).mean(0)
        loss = (divergence * decay ** torch.arange(n, device=divergence.device)).sum() / n
        sequence = torch.arange(len(at), device=at.device)[:, None, None].expand_as(at)
        return Guessed(loss, log_probs.detach(), batch.ids[sequence, at + 1][kept])


@torch.no_grad()
def _context(base: PreTrainedModel, ids: Tensor, at: Tensor) -> tuple[DynamicCache, Tensor]:
    """The keys and values of the sequences, and the model's own logits at positions `at` `[batch, count, n]`.

    Padding stands at the right, where a causal mask hides it from every position that is used.
    """
    keep, where = at.unique(return_inverse=True)
    cache = DynamicCache(config=base.config)
    logits = base(input_ids=ids, **with_cache(base, cache), logits_to_keep=keep).logits
    sequence = torch.arange(len(ids), device=ids.device)[:, None, None].expand_as(at)
    return cache, logits[sequence, where]


def _prompt_log_probs(
    base: PreTrainedModel, cache: DynamicCache, embeddings: Tensor, prefix: Tensor | None, batch: Batch
) -> Tensor:
    """Log-probabilities `[batch, count, n, vocab]` float32, averaged over each prompt token's embeddings."""
    (n, v, _), (size, count) = embeddings.shape, batch.points.shape
    logits = base(**_rows(base, cache, embeddings, prefix, batch)).logits
    return average(logits.view(size, count, n, v, -1), 3)


@torch.no_grad()
def last_states(
    base: PreTrainedModel, embeddings: Tensor, prefix: Tensor | None, batch: Batch
) -> tuple[Tensor, Tensor]:
    """Last hidden states of the sequences `[batch, length, hidden]`, and of the prompt tokens `embeddings`
    `[n, v, hidden]` and their `prefix` after the points of `batch`, averaged over each prompt token's embeddings
    `[batch, count, n, hidden]`."""
    layer = base.config.get_text_config().num_hidden_layers
    cache, only = DynamicCache(config=base.config), {**states_wanted([layer]), **only_last(base)}
    context = base(input_ids=batch.ids, **with_cache(base, cache), **only).hidden_states[layer]
    rows = _rows(base, cache, embeddings.to(base.device), prefix, batch)
    states: Tensor = base(**rows, **only).hidden_states[layer]
    return context, states.view(*batch.points.shape, *embeddings.shape).mean(3)


def _rows(
    base: PreTrainedModel, cache: DynamicCache, embeddings: Tensor, prefix: Tensor | None, batch: Batch
) -> dict[str, Any]:
    """Arguments of a forward of the prompt tokens after all points, `[batch, count * n * v]` rows."""
    (n, v, hidden), (size, count), length = embeddings.shape, batch.points.shape, batch.ids.shape[1]
    see = insertion_mask(batch.points, length, n, v)
    ahead = batch.points.clamp(min=0)[..., None, None] + 1 + torch.arange(n, device=see.device)[:, None]
    positions = ahead.expand(size, count, n, v).reshape(size, -1)
    columns = torch.cat([torch.arange(length, device=see.device).expand(size, -1), positions], dim=1)
    front = see.new_ones(*see.shape[:2], _put_before(cache, prefix))
    rows = embeddings.to(base.dtype).expand(size, count, n, v, hidden).reshape(size, -1, hidden)
    return {
        "inputs_embeds": rows,
        "attention_mask": layered_mask(Attention.of(base), cache, see, positions, columns, front),
        "position_ids": positions,
        **with_cache(base, cache),
    }


def _put_before(cache: DynamicCache, prefix: Tensor | None) -> int:
    """Put the `prefix` before what `cache` holds, in layers that keep the whole context; how many columns it has."""
    if prefix is None:
        return 0
    for layer, states in zip(whole_context(cache), prefix, strict=True):
        keys, values = (each.to(layer.keys).expand(len(layer.keys), -1, -1, -1) for each in states)
        layer.keys, layer.values = torch.cat([keys, layer.keys], dim=-2), torch.cat([values, layer.values], dim=-2)
    return prefix.shape[3]


def insertion_mask(points: Tensor, length: int, n: int, v: int) -> Tensor:
    """Who sees whom: bool `[batch, rows, length + rows]` with `rows = count * n * v`, point-major, then token.

    A row sees the sequence up to its point, and of its own group the same embedding of the tokens up to its
    own: the ensemble mask (PPD, section 3.2).
    """
    size, count = points.shape
    context = torch.arange(length, device=points.device) <= points[..., None]
    context = context.repeat_interleave(n * v, dim=1)
    token = torch.arange(n, device=points.device)
    ensemble = torch.kron((token[:, None] >= token).float(), torch.eye(v, device=points.device))
    own = torch.kron(torch.eye(count, device=points.device), ensemble).bool()
    return torch.cat([context, own.expand(size, -1, -1)], dim=-1)
