"""A base's output head, and what the base does to its logits behind it: for those who borrow both.

Knows the names that configurations give it. Does not know draft heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


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
