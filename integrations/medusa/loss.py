"""The loss of Medusa heads (arXiv 2401.10774, section 2.2.1) over many positions of replies at once.

Knows hidden states, truth and the base's output head. Does not know where the states come from or when to stop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from ppd_compose.finish import OutputHead
from ppd_compose.training_loop import Taught

from .heads import residual

OUTSIDE = -100  # in place of a token that the heads cannot choose


@dataclass(frozen=True)
class Batch:
    """Replies one after the other, and the positions in them after which the heads guess."""

    states: Tensor  # [rows, hidden] of all positions, in the base's dtype
    points: Tensor  # [points], rows of `states`
    truth: Tensor  # [heads, points], entry of the token k + 1 after the point for head k from 1, or OUTSIDE


class Blocks(nn.Module):
    """Residual blocks in training: float32 parameters, products in the base's dtype.

    They begin as nothing, x + SiLU(0) = x, so that every head begins as the base's own guess of the next token.
    """

    def __init__(self, heads: int, layers: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, layers, hidden, hidden))
        self.bias = nn.Parameter(torch.zeros(heads, layers, hidden))

    def forward(self, batch: Batch, output: OutputHead, decay: float, kl: float) -> Taught:
        """The loss: over heads k from 0 the sum of decay**k ((1 - kl) cross entropy + kl divergence).

        The cross entropy is that of the reply's own token, over the points where the heads can choose it; the
        divergence that of the base's distribution after the tokens in between, over the same entries.
        """
        log_probs = self.logits(batch, output).log_softmax(-1)
        known = batch.truth != OUTSIDE
        own = log_probs.gather(-1, batch.truth.clamp(min=0)[..., None])[..., 0]
        losses = (kl - 1) * (own * known).sum(1) / known.sum(1).clamp(min=1)
        if kl:
            target = _base_log_probs(batch, output, len(log_probs))
            losses = losses + kl * kl_div(log_probs, target, reduction="none", log_target=True).sum(-1).mean(1)
        weights = decay ** torch.arange(len(losses), device=losses.device)
        top1 = (log_probs.argmax(-1) == batch.truth).float().mean(1)
        return Taught((weights * losses).sum(), top1.detach())

    def logits(self, batch: Batch, output: OutputHead) -> Tensor:
        """What the heads say `[heads, points, entries]` float32 after the points."""
        hidden, dtype = batch.states[batch.points], batch.states.dtype
        states = residual(hidden, self.weight.to(dtype), self.bias.to(dtype))
        return output(states)


@torch.no_grad()
def _base_log_probs(batch: Batch, output: OutputHead, heads: int) -> Tensor:
    """The base's own distributions `[heads, points, entries]` float32 at what the heads guess."""
    ahead = batch.points + torch.arange(1, heads + 1, device=batch.points.device)[:, None]
    rows, at = ahead.unique(return_inverse=True)  # neighbouring points ask for the same ones
    return output(batch.states[rows][None])[0].log_softmax(-1)[at]
