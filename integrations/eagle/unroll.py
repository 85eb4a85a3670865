"""EAGLE-3's loss, training-time test (arXiv 2503.01840, section 3.2): the draft layer learns from its own outputs.

Knows the unrolled steps, who sees whom in them, and the divergence from the base's own distribution. Does not know
optimisers, files or where replies come from.

At a point p the first step runs the pair of position p over all pairs up to it. Every further step takes the feature
that the step before gave at p, with the embedding of the token that in truth comes next, and sees besides the pairs
up to p only its own earlier steps at p: what a draft sees that was right so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ppd_compose.finish import OutputHead
from ppd_compose.training_loop import Taught

from .network import Drafted, DraftNetwork, Rows


@dataclass(frozen=True)
class Lesson:
    """One reply: what the draft layer is given, and what it should say."""

    states: Sequence[Tensor]  # [length, state_size] for each of the layers that are read
    last: Tensor  # [length, state_size], the normalised last hidden state
    embeddings: Tensor  # [length, hidden] of all tokens
    truth: Tensor  # int64 [length], the draft id of each token; -1 where it has none
    points: Tensor  # int64 [points], ascending

    def teacher(self, output: OutputHead, steps: int) -> Tensor:
        """The base's own distribution over the draft vocabulary `[steps, points, draft vocab]` float32."""
        first, last = int(self.points[0]), int(self.points[-1])
        rows = output(self.last[first + 1 : last + steps + 1]).softmax(-1)
        return torch.stack([rows[self.points - first + step] for step in range(steps)])


def unroll(network: DraftNetwork, lesson: Lesson, steps: int) -> Tensor:
    """What the output head takes after each of `steps` `[steps, points, hidden]`."""
    points, count = lesson.points, len(lesson.points)
    known = torch.arange(int(points[-1]) + 1, device=points.device)
    rows = network.rows(lesson.embeddings[known + 1], network.fuse([state[known] for state in lesson.states]))
    rope = network.rope(known, rows.residual)
    keys, values = network.remember(rows, rope)
    see = known <= points[:, None]
    out: Drafted = network(
        Rows(*(part[points] for part in rows)), network.rope(points, rows.residual), keys, values, see
    )
    told = [out.hidden]
    for step in range(1, steps):
        rows = network.rows(lesson.embeddings[points + 1 + step], out.feature)
        rope = network.rope(points + step, rows.residual)
        more = network.remember(rows, rope)
        keys, values = torch.cat([keys, more[0]], dim=1), torch.cat([values, more[1]], dim=1)
        see = torch.cat([see, torch.eye(count, dtype=torch.bool, device=see.device)], dim=1)
        out = network(rows, rope, keys, values, see)
        told.append(out.hidden)
    return torch.stack(told)


class Student(nn.Module):
    """A draft network in training. Output heads are no submodules, so that no checkpoint takes them up."""

    def __init__(self, network: DraftNetwork, output: OutputHead, teacher: OutputHead) -> None:
        super().__init__()
        self.network = network
        self.heads = (output, teacher)

    def forward(self, lessons: Sequence[Lesson], steps: int, decay: float) -> Taught:
        """Sum over steps of `decay ** step` times the soft cross-entropy, at points whose token can be drafted."""
        told = [self._taught(lesson, steps) for lesson in lessons]
        losses, right = (torch.stack(part).mean(0) for part in zip(*told, strict=True))
        weights = decay ** torch.arange(steps, device=losses.device)
        return Taught((losses * weights).sum() / steps, right)

    def _taught(self, lesson: Lesson, steps: int) -> tuple[Tensor, Tensor]:
        """Loss and share of right first guesses by step `[steps]`."""
        output, teacher = self.heads
        with torch.no_grad():
            target = lesson.teacher(teacher, steps)
        log_probs = output(unroll(self.network, lesson, steps).flatten(0, 1)).log_softmax(-1).view_as(target)
        truth = torch.stack([lesson.truth[lesson.points + 2 + step] for step in range(steps)])
        known = truth >= 0
        entropies = -(target * log_probs).sum(-1) * known
        right = (log_probs.argmax(-1) == truth).float().mean(-1)
        return entropies.sum(-1) / known.sum(-1).clamp(min=1), right
