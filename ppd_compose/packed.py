"""Linear layers whose weights are packed once for the CPU's matrix kernels, those that read the same rows together.

A product with a few rows otherwise spends much of its time on rearranging the weight, at every forward anew. Knows
linear layers, and when a weight has changed. Kernels are `kernels`'. Does not know decoding.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .changes import state_of
from .kernels import Multiply, can_multiply, multiplier
from .paging import give_back, page_out

# Children of one module that read the same rows, in most models.
LOOK = 16  # numbers of a tensor by which it is seen that it was written
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class _Pack:
    """The product with weights below one another in packed form and their biases, and what that was made from."""

    made_from: tuple[weakref.ref[Tensor], ...]
    state: tuple[tuple[int, int], ...]
    looks: tuple[bytes, ...]
    multiply: Multiply


# By the weights' identities, and only as long as they live. Looked up some hundred times in a forward, so a plain
# dictionary: torch's own of weak keys takes longer than some of the products.
_packs: dict[tuple[int, ...], _Pack] = {}

_library = torch.library.Library("ppd_compose", "DEF")
_library.define("linear(Tensor rows, Tensor[] weights, Tensor[] biases) -> Tensor")


class Siblings:
    """Linear layers of the same rows: whichever is asked first computes all of them in one product."""

    def __init__(self, layers: Sequence[PackedLinear]) -> None:
        self.layers = list(layers)
        self.held: _Parts | None = None

    def part(self, layer: PackedLinear, rows: Tensor) -> Tensor:
        """What `layer` makes of `rows`."""
        held = self.held  # read once, as another thread may put its own there at any moment
        if held is None or held.of is not rows or layer not in held.waiting:
            parts = _product(rows, self.layers).split([each.out_features for each in self.layers], -1)
            held = self.held = _Parts(rows, dict(zip(self.layers, parts, strict=True)))
        part = held.waiting.pop(layer)
        if not held.waiting:
            self.held = None
        return part


@dataclass(frozen=True)
class _Parts:
    """What layers made of some rows and were not asked for yet."""

    of: Tensor
    waiting: dict[PackedLinear, Tensor]


class PackedLinear(nn.Linear):
    """The same linear map by the same parameters. It computes as ever while gradients are wanted, off the CPU, and in
    autocast, which asks for another dtype than the weight's."""

    siblings: Siblings | None  # with itself; None: it stands alone

    def forward(self, input: Tensor) -> Tensor:
        """`input @ weight.T + bias`, `[..., in]` to `[..., out]`."""
        if torch.is_grad_enabled() or input.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        return _product(input, [self]) if self.siblings is None else self.siblings.part(self, input)


def pack(model: Any) -> None:
    """Pack all plain linear layers of `model`, whose submodules are its own. That takes as much memory again as their
    weights, or twice as much where half precision is kept in float32, from the first forward on; weights that lie in a
    file, as they do where a base was loaded in the dtype of its file, are left to it until somebody reads them.

    Raises `ValueError` where torch has no oneDNN, or `model` is not on the CPU in a dtype that is packed there.
    """
    if not can_pack(model):
        raise ValueError(
            "weights are packed for a CPU with oneDNN in float32, bfloat16 or, where it does not multiply in that "
            f"itself, float16; the base is on {model.device} in {model.dtype}: leave packed=False"
        )
    pack_layers(model)


def pack_layers(modules: nn.Module) -> None:
    """Pack the plain linear layers of `modules`, which are on the CPU, whose dtype there are kernels for."""
    fresh: set[int] = set()
    for module in modules.modules():
        # A subclass computes something of its own, and so does a weight of another class, such as a quantised one.
        if type(module) is nn.Linear and type(module.weight) is nn.Parameter and can_multiply(module.weight.dtype):
            module.__class__ = PackedLinear
            vars(module)["siblings"] = None
            fresh.add(id(module.weight))
    # What was packed before may be of other numbers: writes by way of `.data`, as PEFT merges, leave no trace.
    for key in [key for key in list(_packs) if not fresh.isdisjoint(key)]:  # other threads pack meanwhile
        _packs.pop(key, None)
    for module in modules.modules():
        for names in TOGETHER:
            _bring_together([getattr(module, name, None) for name in names])


def look_again(model: nn.Module) -> None:
    """Forget what was packed of the weights of `model` where a look at a few numbers of each tells that any of them was
    written since: neither fused optimisers nor PEFT, which merges by way of `.data`, leave another trace."""
    tensors = {id(tensor): tensor for tensor in model.parameters()}
    mine = {key: pack for key, pack in list(_packs.items()) if not tensors.keys().isdisjoint(key)}
    seen = (pair for key, pack in mine.items() for pair in zip(key, pack.looks, strict=True) if pair[0] in tensors)
    if any(_look(tensors[one]) != look for one, look in seen):
        for key in mine:
            _packs.pop(key, None)


def is_packed(model: Any) -> bool:
    """Whether layers of `model` were packed."""
    return any(isinstance(module, PackedLinear) for module in model.modules())


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rows @ weight.T + bias`, `[..., in]` to `[..., out]`, where `weight` need not be a layer's.

    By a packed copy of `weight`, which is kept for as long as it lives, for use beside a model that `can_pack`; as ever
    off the CPU, in another dtype than the weight's, while gradients are wanted, and for weights that are more than a
    plain tensor.
    """
    plain = type(weight) in (Tensor, nn.Parameter) and rows.device.type == "cpu" and rows.dtype == weight.dtype
    if torch.is_grad_enabled() or not plain or not can_multiply(rows.dtype):
        return nn.functional.linear(rows, weight, bias)
    return _linear(rows, [weight], [] if bias is None else [bias])


def _bring_together(layers: list[Any]) -> None:
    alike = {(type(layer), getattr(layer, "in_features", 0), getattr(layer, "bias", None) is None) for layer in layers}
    if len(alike) == 1 and type(layers[0]) is PackedLinear:
        siblings = Siblings(layers)
        for layer in layers:
            layer.siblings = siblings


def can_pack(model: Any) -> bool:
    """Whether there are kernels for the packed weights of `model`, where it is."""
    return bool(model.device.type == "cpu" and can_multiply(model.dtype))


def _product(rows: Tensor, layers: Sequence[PackedLinear]) -> Tensor:
    weights = [layer.weight for layer in layers]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.ppd_compose.linear(rows, weights, biases)
        return out
    return _linear(rows, weights, biases)


def _linear(rows: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    return _packed((*weights, *biases), len(weights)).multiply(rows)


def _packed(tensors: tuple[Tensor, ...], weights: int) -> _Pack:
    """The packed form of the first `weights` of `tensors`, the others being their biases; made anew when one of them
    has changed since."""
    key = tuple(map(id, tensors))
    state = tuple([state_of(tensor) for tensor in tensors])
    known = _packs.get(key)
    if known is None or known.state != state or any(ref() is None for ref in known.made_from):
        marks = tuple(weakref.ref(tensor, lambda gone: _forget(key, gone)) for tensor in tensors)
        looks = tuple(map(_look, tensors))
        known = _Pack(marks, state, looks, _laid_out(tensors[:weights], tensors[weights:]))
        _packs[key] = known
    return known


def _look(tensor: Tensor) -> bytes:
    """A few numbers out of the middle of `tensor`, bit for bit: all of one or two pages of memory."""
    whole, size = tensor.contiguous(), tensor.element_size()
    begin = tensor.numel() // 2 * size
    # By its address, as slicing a tensor takes ten times as long and there are hundreds.
    return ctypes.string_at(whole.data_ptr() + begin, min(LOOK * size, whole.nbytes - begin))


def _laid_out(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Multiply:
    parts = [weight.detach() for weight in weights]
    bias = torch.cat([bias.detach() for bias in biases]) if biases else None
    multiply = multiplier(torch.cat(parts) if parts[1:] else parts[0], bias)
    for weight in weights:
        page_out(weight)
    give_back()  # what the weights were widened to
    return multiply


def _forget(key: tuple[int, ...], gone: weakref.ref[Tensor]) -> None:
    """Drop what is kept under `key`, unless other tensors took the places of those that are gone."""
    known = _packs.get(key)
    if known is not None and any(ref is gone for ref in known.made_from):
        _packs.pop(key, None)


def _shape(rows: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], sum(weight.shape[0] for weight in weights))


_library.impl("linear", _linear, "CPU")
torch.library.register_fake("ppd_compose::linear", _shape, lib=_library)
