"""Linear layers whose weights are packed once for the CPU's matrix kernels.

A product with a few rows otherwise spends much of its time on rearranging the weight, at every forward anew. Knows
linear layers and oneDNN. Does not know decoding.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 16  # the number of rows that weights are laid out for; others are computed from the same layout
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class _Pack:
    """A weight, its packed form, and what that was packed from."""

    weight: weakref.ref[Tensor]
    state: tuple[int, int]
    packed: Tensor


# By the weight's identity, and only as long as it lives. Looked up some hundred times in a forward, so a plain
# dictionary: torch's own of weak keys takes longer than some of the products.
_packs: dict[int, _Pack] = {}

_library = torch.library.Library("ppd_compose", "DEF")
_library.define("linear(Tensor rows, Tensor weight, Tensor? bias) -> Tensor")


class PackedLinear(nn.Linear):
    """The same linear map by the same parameters. While gradients are wanted, or off the CPU, it computes as ever."""

    def forward(self, input: Tensor) -> Tensor:
        """`input @ weight.T + bias`, `[..., in]` to `[..., out]`."""
        if torch.is_grad_enabled() or input.device.type != "cpu":
            return super().forward(input)
        if torch.compiler.is_compiling():
            out: Tensor = torch.ops.ppd_compose.linear(input, self.weight, self.bias)
            return out
        return _linear(input, self.weight, self.bias)


def pack(model: Any) -> None:
    """Pack all plain linear layers of `model`, whose submodules are its own. That takes as much memory again as their
    weights, from the first forward on.

    Raises `ValueError` where torch has no oneDNN, or `model` is not on the CPU in float32 or bfloat16.
    """
    if not can_pack(model):
        raise ValueError(
            f"weights are packed for a CPU with oneDNN in float32 or bfloat16, the base is on {model.device} in "
            f"{model.dtype}: leave packed=False"
        )
    for module in model.modules():
        if type(module) is nn.Linear:  # a subclass computes something of its own
            module.__class__ = PackedLinear


def can_pack(model: Any) -> bool:
    """Whether there are kernels for the packed weights of `model`, where it is."""
    here = model.device.type == "cpu" and model.dtype in DTYPES and torch.backends.mkldnn.is_available()
    return here and (model.dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def _packed(weight: Tensor) -> Tensor:
    """The packed form of `weight`, made anew when it has changed since."""
    state, known = (weight._version, weight.data_ptr()), _packs.get(id(weight))
    if known is None or known.state != state or known.weight() is not weight:
        key = id(weight)
        mark = weakref.ref(weight, lambda gone: _forget(key, gone))
        known = _Pack(mark, state, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS))
        _packs[key] = known
    return known.packed


def _forget(key: int, gone: weakref.ref[Tensor]) -> None:
    """Drop what is kept under `key`, unless another weight took the place of the one that is gone."""
    if key in _packs and _packs[key].weight is gone:
        del _packs[key]


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, _packed(weight), bias, "none", [], "")
    return out


def _shape(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], weight.shape[0])


_library.impl("linear", _linear, "CPU")
torch.library.register_fake("ppd_compose::linear", _shape, lib=_library)
