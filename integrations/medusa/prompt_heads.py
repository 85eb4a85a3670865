"""Heads that read prompt tokens: what the prompt tokens below the last accepted node say, told better.

A prompt token guessed before anyone knew where acceptance ends; these heads know the last accepted token's hidden state
and the token after it. Knows their tensors and files. Does not know candidate trees or training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from ppd_compose.device import rows_of
from ppd_compose.paired import read_pair, write_pair
from ppd_compose.tensor_files import tensors_in
from ppd_compose.tree import Ints

TENSORS, FACTS = "prompt_heads.safetensors", "prompt_heads.json"


@dataclass(frozen=True)
class PromptHeads:
    """One block for each distance, h + SiLU([h; last; root] D) U, of a prompt token's last hidden state h.

    Attributes:
        down: D `[distances, 3 * hidden, width]`.
        up: U `[distances, width, hidden]`.
        prompt_tokens: `PromptTokens.digest` of those that they were trained beside; others say other things.
        facts: their "accuracy" on held-out replies `[distance][rank]` and their "training", as plain data.

    Raises:
        ValueError: shapes that do not belong together, or numbers that are not finite.
    """

    down: Tensor
    up: Tensor
    prompt_tokens: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        down, up = tuple(self.down.shape), tuple(self.up.shape)
        if len(down) != 3 or len(up) != 3 or 0 in up or down != (up[0], 3 * up[2], up[1]):
            raise ValueError(
                f"prompt heads must be [distances, 3 * hidden, width] and [distances, width, hidden], got {down} and "
                f"{up}"
            )
        if not (self.down.isfinite().all() and self.up.isfinite().all()):
            raise ValueError("prompt heads hold NaN or infinite values: the file is damaged or training diverged")

    def __len__(self) -> int:
        return len(self.up)

    @property
    def hidden_size(self) -> int:
        return self.up.shape[2]

    def to(self, weight: Tensor) -> PromptHeads:
        """The same in the dtype and on the device of `weight`."""
        return replace(self, down=self.down.to(weight), up=self.up.to(weight))

    def __call__(self, states: Tensor, last: Tensor, root: Tensor) -> Tensor:
        """See `reread`; of as many distances as `states` has."""
        return reread(self.down[: len(states)], self.up[: len(states)], states, last, root)


def reread(down: Tensor, up: Tensor, states: Tensor, last: Tensor, root: Tensor) -> Tensor:
    """States `[distances, points, hidden]` for the output head.

    Args:
        down: `[distances, 3 * hidden, width]`.
        up: `[distances, width, hidden]`.
        states: of prompt tokens `[distances, points, hidden]`.
        last: of the token that they hang from `[points, hidden]`.
        root: embedding of the token that followed it `[points, hidden]`.
    """
    seen = torch.stack([states, last.expand_as(states), root.expand_as(states)], dim=-2)
    return states + silu(rms_norm(seen, seen.shape[-1:]).flatten(-2) @ down) @ up


def by_distance(states: Tensor, distance: Ints) -> Tensor:
    """States of the rows of prompt tokens `[rows, hidden]`, averaged over those of each `distance` `[rows]`:
    `[distances, 1, hidden]`."""
    if len(distance) == distance[-1] + 1:
        return states[:, None]
    mine = [np.flatnonzero(distance == i).tolist() for i in range(distance[-1] + 1)]
    return torch.stack([rows_of(states, rows).mean(0, keepdim=True) for rows in mine])


def write_prompt_heads(heads: PromptHeads | None, folder: Path) -> None:
    """Write `heads` to `folder`, or take away those that lie there."""
    if heads is None:
        for name in (TENSORS, FACTS):
            (folder / name).unlink(missing_ok=True)
        return
    facts = {"prompt_tokens": heads.prompt_tokens, **heads.facts}
    write_pair({"down": heads.down, "up": heads.up}, folder / TENSORS, facts, FACTS, card="")


def read_prompt_heads(folder: Path) -> PromptHeads | None:
    """Those that lie in `folder`, if any do. Raises `ValueError` for a file that is damaged or holds something else."""
    path = folder / TENSORS
    if not path.is_file():
        return None
    told = read_pair(path, FACTS)
    try:
        tensors = tensors_in(path)
        kept: dict[str, Any] = {name: told[name] for name in ("accuracy", "training") if name in told}
        return PromptHeads(tensors["down"], tensors["up"], str(told["prompt_tokens"]), kept)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} holds no prompt heads ({error}): fetch or save them again") from None
