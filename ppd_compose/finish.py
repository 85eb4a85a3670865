"""What a base does to its logits behind its output head, so that who borrows the head says what the base would.

Knows the names that configurations give it. Does not know heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
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
