"""A sequence that grows by one token at a time.

Knows how to keep it without a copy at each. Does not know what its tokens are for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Growing:
    """A sequence `[1, length]` int64 that grows by one token at a time without being copied at each."""

    def __init__(self, ids: Tensor) -> None:
        self.length = ids.shape[1]
        self._keep(nn.functional.pad(ids.long(), (0, max(64, self.length))))

    def append(self, token: int) -> None:
        if self.length == self.buffer.shape[1]:
            self._keep(torch.cat([self.buffer, torch.zeros_like(self.buffer)], dim=1))
        self.row[self.length] = token
        self.length += 1

    def first(self, length: int) -> Tensor:
        return self.buffer[:, :length]

    def all(self) -> Tensor:
        return self.first(self.length)

    def _keep(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.row: Any = buffer[0].numpy() if buffer.device.type == "cpu" else buffer[0]  # written fifty times as fast
