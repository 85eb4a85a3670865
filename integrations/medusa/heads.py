"""Medusa heads (arXiv 2401.10774, section 2.1) as tensors, and what they say after a hidden state.

Knows residual blocks, output heads and truncated vocabularies. Does not know files, candidate trees or training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers import PreTrainedModel

from ppd_compose.finish import OutputHead
from ppd_compose.packed import is_packed, product

from .prompt_heads import PromptHeads


@dataclass(frozen=True)
class Heads:
    """Heads of `layers` residual blocks each; head k (from 1) guesses the token k after the next one.

    Attributes:
        weight: `[heads, layers, hidden, hidden]`, of the blocks x + SiLU(Wx + b).
        bias: `[heads, layers, hidden]`, or None where the blocks have none.
        outputs: output heads `[entries, hidden]`: one a head, one for all, or none at all: the base's own is used.
        token_map: `[entries]` int64, the token of each entry, or None where entry i is token i.
        vocab_size: tokens of the base that the heads are for, where that is known.

    Raises:
        ValueError: shapes that do not belong together, or a token map with a token twice.
    """

    weight: Tensor
    bias: Tensor | None = None
    outputs: tuple[Tensor, ...] = ()
    token_map: Tensor | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.weight.shape)
        if len(shape) != 4 or 0 in shape or shape[2] != shape[3]:
            raise ValueError(f"the blocks of Medusa heads must be [heads, layers, hidden, hidden], got {shape}")
        if self.bias is not None and tuple(self.bias.shape) != shape[:3]:
            raise ValueError(f"the biases must be {list(shape[:3])} as the blocks are, got {tuple(self.bias.shape)}")
        if len(self.outputs) not in (0, 1, len(self)):
            raise ValueError(f"{len(self)} heads take {len(self)} output heads, one or none, got {len(self.outputs)}")
        sizes = {tuple(output.shape) for output in self.outputs}
        if sizes and sizes != {(self.entries, self.hidden_size)}:
            raise ValueError(f"output heads must all be [entries, {self.hidden_size}], got {sorted(sizes)}")
        if self.token_map is not None:
            check_tokens(self.token_map, self.vocab_size)
        elif self.vocab_size not in (None, self.entries):
            raise ValueError(f"output heads of {self.entries} entries for {self.vocab_size} tokens: give a token_map")

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[3]

    @property
    def vocabulary(self) -> int | None:
        """Tokens of the base that the heads are for, where that is told or can be seen."""
        whole = self.outputs and self.token_map is None
        return len(self.outputs[0]) if whole else self.vocab_size

    @property
    def entries(self) -> int | None:
        """How many tokens the heads choose from; None where it is all of the base's."""
        if self.token_map is not None:
            return len(self.token_map)
        return self.vocabulary

    def to(self, weight: Tensor) -> Heads:
        """The same in the dtype and on the device of `weight`; not copied where they are so already."""
        return replace(
            self,
            weight=self.weight.to(weight),
            bias=None if self.bias is None else self.bias.to(weight),
            outputs=tuple(output.to(weight) for output in self.outputs),
            token_map=None if self.token_map is None else self.token_map.to(weight.device),
        )


@dataclass(frozen=True)
class Placed:
    """Heads ready to run beside one base: in its dtype, on its device, every output head at hand."""

    heads: Heads
    output: OutputHead | None  # the base's, where the heads have none of their own or prompt heads are there
    embed: Callable[[Tensor], Tensor]  # the base's, of token ids
    prompt_heads: PromptHeads | None = None
    packed: bool = False  # output heads are multiplied with by packed copies

    def logits(self, hidden: Tensor) -> Tensor:
        """What each head says `[heads, rows, entries]` float32 after `hidden` `[rows, hidden]`."""
        heads, multiplied = self.heads, product if self.packed else linear
        states = residual(hidden.to(heads.weight), heads.weight, heads.bias)
        if not heads.outputs:
            assert self.output is not None
            return self.output(states)
        return entry_logits(states, heads.outputs, multiplied).float()

    def reread(self, states: Tensor, last: Tensor, root: Tensor) -> Tensor:
        """What prompt tokens say `[distances, rows, entries]` float32; see `prompt_heads.reread`, of whose arguments
        `root` `[rows]` are tokens here."""
        assert self.prompt_heads is not None
        assert self.output is not None
        like = self.prompt_heads.up
        return self.output(self.prompt_heads(states.to(like), last.to(like), self.embed(root).to(like)))


def check_tokens(token_map: Tensor, vocab_size: int | None = None) -> None:
    """Raise `ValueError` unless `token_map` holds different tokens `[entries]` int64, of a vocabulary of that size."""
    kind = f"{list(token_map.shape)} {token_map.dtype}"
    if token_map.ndim != 1 or not len(token_map) or token_map.dtype != torch.int64:
        raise ValueError(f"token_map must be tokens [entries] int64, got {kind}")
    if len(token_map.unique()) != len(token_map):
        raise ValueError("token_map holds a token twice: each entry must stand for a token of its own")
    lowest, highest = int(token_map.min()), int(token_map.max())
    if lowest < 0 or (vocab_size is not None and highest >= vocab_size):
        raise ValueError(f"token_map holds tokens {lowest} to {highest}, outside the vocabulary of {vocab_size}")


def placed(heads: Heads, prompt_heads: PromptHeads | None, model: PreTrainedModel) -> Placed:
    """Give `heads` and `prompt_heads`, which are on the model's device, its output head where one of them uses it:
    referred to, or copied rows of a token map."""
    packed, embed = is_packed(model), cast(Callable[[Tensor], Tensor], model.get_input_embeddings())
    if heads.outputs and prompt_heads is None:
        return Placed(heads, None, embed, None, packed)
    output = replace(OutputHead.of(model, heads.token_map), packed=packed)
    return Placed(heads, output, embed, prompt_heads, packed)


def residual(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Block after block of every head: `hidden` `[rows, hidden]` -> `[heads, rows, hidden]`."""
    states = hidden.expand(len(weight), *hidden.shape)
    for layer in range(weight.shape[1]):
        inner = states @ weight[:, layer].mT
        states = states + silu(inner if bias is None else inner + bias[:, layer, None])
    return states


def entry_logits(states: Tensor, outputs: Sequence[Tensor], multiplied: Callable[..., Tensor] = linear) -> Tensor:
    """Logits `[heads, rows, entries]` of `states` `[heads, rows, hidden]` by one output head for all or one a head."""
    if len(outputs) == 1:
        return multiplied(states, outputs[0])
    return torch.stack([multiplied(own, output) for own, output in zip(states, outputs, strict=True)])
