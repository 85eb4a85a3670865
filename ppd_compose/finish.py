"""A base's output head, and what the base does to its logits behind it: for those who borrow both.

Knows the names that configurations give it. Does not know draft heads.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .modes import evaluating
from .packed import product

FAR = 0.05  # of the largest logit: more than half precision rounds them by


@dataclass(frozen=True)
class Finish:
    """Logits are multiplied by `scale`, and then kept between `-cap` and `cap` by a tanh where there is one."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Finish:
        """That of `model`: Cohere, Granite and Gemma name it so."""
        config: Any = model.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
        return cls(float(scale), getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits: Tensor) -> Tensor:
        """The base's own logits, of the output head's `logits`, of any shape."""
        scaled = logits if self.scale == 1 else logits * self.scale
        return scaled if self.cap is None else torch.tanh(scaled / self.cap) * self.cap


PLAIN = Finish()  # the logits as they are


@dataclass(frozen=True)
class OutputHead:
    """A base's output head, as far as heads use it, and what comes behind it; it is not trained."""

    weight: Tensor  # [entries, hidden]
    bias: Tensor | None = None  # [entries]
    finish: Finish = PLAIN
    packed: bool = False  # by a packed copy of the weight

    @classmethod
    def of(cls, model: PreTrainedModel, tokens: Tensor | None = None) -> OutputHead:
        """The rows `tokens` int64 `[entries]` of that of `model`, or all of it, which is not copied then.

        Raises `ValueError` when it has none, or one that is no matrix of floats.
        """
        return cls(*output_rows(model, tokens), Finish.of(model))

    def matrix(self) -> Tensor:
        """What makes the same logits as a matrix alone `[entries, hidden]`. Raises `ValueError` where none does."""
        if self.bias is not None or self.finish.cap is not None:
            more = "adds a bias to its logits" if self.finish.cap is None else "caps its logits"
            raise ValueError(f"the base {more}, which cannot be stored with an output head: save without base")
        return self.weight if self.finish.scale == 1 else self.weight * self.finish.scale

    def to(self, like: Tensor) -> OutputHead:
        """The same in the dtype and on the device of `like`."""
        bias = None if self.bias is None else self.bias.to(like)
        return replace(self, weight=self.weight.to(like), bias=bias)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits `[..., entries]` float32 of `hidden` `[..., hidden]`."""
        multiplied = product if self.packed else nn.functional.linear
        return self.finish(multiplied(hidden, self.weight, self.bias).float())


@torch.no_grad()
def refuse_other_logits(model: PreTrainedModel) -> None:
    """Raise `ValueError` unless the logits of `model` are those that `OutputHead.of(model)` makes of its last hidden
    states, by a forward of two tokens: heads that use it would say something else."""
    with evaluating(model) if model.training else nullcontext():
        ids = torch.tensor([[0, 1]], device=model.device)
        out: Any = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    head = OutputHead.of(model)
    mine, theirs = head(out.hidden_states[-1].to(head.weight)), out.logits.float().to(head.weight.device)
    if (mine - theirs).abs().max() > FAR * theirs.abs().max():
        raise ValueError(
            f"the logits of {type(model).__name__} are not those that its output head makes of its last hidden states, "
            "so draft heads that use it would guess wrongly: take heads with output heads of their own, or others"
        )


def output_head(model: PreTrainedModel) -> nn.Linear:
    """The base's output head. Raises `ValueError` when it is not a matrix of floats `[vocab, hidden]` in memory."""
    head: Any = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point() or weight.is_meta:
        kind = type(head).__name__ if weight is None else f"{type(head).__name__} of {weight.dtype} on {weight.device}"
        raise ValueError(
            f"a draft head needs the output head of {type(model).__name__} as a matrix of floats, it is {kind}: load "
            "the base with its output head neither quantised nor offloaded"
        )
    return head  # type: ignore[no-any-return]


def output_rows(model: PreTrainedModel, tokens: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The base's output head `[entries, hidden]` and its bias `[entries]`: all, or copies of the rows of `tokens`
    int64 `[entries]`. Raises as `output_head`."""
    head: Any = output_head(model)
    weight, bias = head.weight, getattr(head, "bias", None)
    if tokens is None:
        return weight, bias  # the very tensors: by their identity packed copies of them are found
    rows = tokens.to(weight.device)
    return weight.detach()[rows], None if bias is None else bias.detach()[rows]
