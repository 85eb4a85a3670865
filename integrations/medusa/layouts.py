"""The names under which published files keep the tensors of Medusa heads, told apart by those names.

Official: `0.0.linear.weight`, alone or as `medusa_head.0.0.linear.weight` beside a whole base. vLLM:
`blocks.0.layers.0.weight`. Knows names and shapes. Does not know files or configs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ppd_compose.tensor_files import some

from .heads import Heads, check_tokens

BESIDE_A_BASE = "medusa_head."
TOKEN_MAP = "token_map"


@dataclass(frozen=True)
class Layout:
    """Templates of the names of one layout."""

    block: str
    output: str
    shared: str  # the one output head of all
    biased: bool  # blocks always have a bias

    def blocks(self, kind: str, heads: int, layers: int) -> list[str]:
        """Names of the weights or biases of all blocks, head by head."""
        return [self.block.format(head=i, layer=j, kind=kind) for i in range(heads) for j in range(layers)]

    def outputs(self, heads: int, layers: int) -> list[str]:
        """Names of the output heads."""
        return [self.output.format(head=i, layers=layers) for i in range(heads)]

    def found(self, names: Iterable[str]) -> set[tuple[int, int]]:
        """Head and layer of each block among `names`."""
        pattern = re.escape(self.block).replace(r"\{kind\}", "(?:weight|bias)")
        pattern = pattern.replace(r"\{head\}", r"(\d+)").replace(r"\{layer\}", r"(\d+)")
        found = (re.fullmatch(pattern, name) for name in names)
        return {(int(match[1]), int(match[2])) for match in found if match}


LAYOUTS = {
    "official": Layout("{head}.{layer}.linear.{kind}", "{head}.{layers}.weight", "", True),
    "vllm": Layout("blocks.{head}.layers.{layer}.{kind}", "lm_heads.{head}.weight", "lm_head.weight", False),
}


def wanted(names: Iterable[str]) -> list[str]:
    """Those of a file's tensors that belong to heads: `medusa_head.*` where there are such, else all of them."""
    every = list(names)
    return [name for name in every if name.startswith(BESIDE_A_BASE)] or every


def read_tensors(named: Mapping[str, Tensor], where: str, *, one_output: bool = False) -> tuple[str, Heads]:
    """The layout's name and the heads that `named` holds.

    Args:
        where: the file, for errors.
        one_output: a lone `lm_heads.0.weight` serves all heads (vLLM's `original_lm_head`).

    Raises:
        ValueError: no heads; a tensor missing, left over, of a wrong shape or kind, or with values not finite.
    """
    tensors = {_plain(name): tensor for name, tensor in named.items()}
    for name, layout in LAYOUTS.items():
        if found := layout.found(tensors):
            return name, _read(tensors, layout, *_counted(found, layout, where), where, one_output)
    raise ValueError(
        f"{where} holds no Medusa heads: expected tensors such as 0.0.linear.weight, medusa_head.0.0.linear.weight or "
        f"blocks.0.layers.0.weight, found {some(named)}"
    )


def write_tensors(heads: Heads, name: str) -> dict[str, Tensor]:
    """Tensors of `heads` by their names in layout `name`, on the host."""
    layout, (count, layers) = LAYOUTS[name], heads.weight.shape[:2]
    parts = list(zip(layout.blocks("weight", count, layers), heads.weight.flatten(0, 1), strict=True))
    bias = heads.bias
    if bias is None and layout.biased:
        bias = heads.weight.new_zeros(heads.weight.shape[:3])
    if bias is not None:
        parts += zip(layout.blocks("bias", count, layers), bias.flatten(0, 1), strict=True)
    if len(heads.outputs) == 1 and layout.shared:
        parts.append((layout.shared, heads.outputs[0]))
    elif heads.outputs:
        outputs = heads.outputs * (count // len(heads.outputs))
        parts += zip(layout.outputs(count, layers), outputs, strict=True)
    if heads.token_map is not None:
        parts.append((TOKEN_MAP, heads.token_map))
    # Of its own memory each, as safetensors wants it.
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in parts}


def _counted(found: set[tuple[int, int]], layout: Layout, where: str) -> tuple[int, int]:
    """Heads and layers. One left out is named here, before a list of all is made for numbers that may be absurd."""
    heads, layers = (1 + max(numbers) for numbers in zip(*found, strict=True))
    if len(found) < heads * layers:
        head, layer = next((i, j) for i in range(heads) for j in range(layers) if (i, j) not in found)
        lacking = layout.block.format(head=head, layer=layer, kind="weight")
        raise ValueError(f"{where} lacks {lacking}: the file is damaged, fetch or save the heads again")
    return heads, layers


def _read(
    tensors: Mapping[str, Tensor], layout: Layout, heads: int, layers: int, where: str, one_output: bool
) -> Heads:
    weights, biases = layout.blocks("weight", heads, layers), layout.blocks("bias", heads, layers)
    if not layout.biased and not any(name in tensors for name in biases):
        biases = []
    outputs = _output_names(tensors, layout, heads, layers, one_output)
    _compare(tensors, [*weights, *biases, *outputs], where)
    width = (*tensors[weights[0]].shape[-1:],) or ("hidden",)
    for names, shape in ((weights, width * 2), (biases, width), (outputs, ("entries", *width))):
        for name in names:
            _check(tensors[name], shape, f"{where}: {name}")
    blocks = _stack(tensors, weights, heads, layers)
    bias = _stack(tensors, biases, heads, layers) if biases else None
    return _made(blocks, bias, [tensors[name] for name in outputs], tensors.get(TOKEN_MAP), where)


def _made(weight: Tensor, bias: Tensor | None, outputs: list[Tensor], token_map: Tensor | None, where: str) -> Heads:
    """The heads; output heads of all tokens are cut to the rows of `token_map`."""
    try:
        if token_map is not None:
            check_tokens(token_map)
            outputs = [output[token_map] if len(output) > len(token_map) else output for output in outputs]
        return Heads(weight, bias, tuple(outputs), token_map)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{where}: {error}") from None


def _output_names(
    tensors: Mapping[str, Tensor], layout: Layout, heads: int, layers: int, one_output: bool
) -> list[str]:
    """The output heads that must be there: none where the layout allows that and no head has one."""
    names = layout.outputs(heads, layers)
    if layout.shared in tensors:
        return [layout.shared]
    if one_output and not any(name in tensors for name in names[1:]):
        return names[:1]
    return names if layout.shared or any(name in tensors for name in names) else []


def _compare(tensors: Mapping[str, Tensor], expected: list[str], where: str) -> None:
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise ValueError(f"{where} lacks {some(missing)}: the file is damaged, fetch or save the heads again")
    surplus = [name for name in tensors if name not in {*expected, TOKEN_MAP}]
    if surplus:
        raise ValueError(f"{where} holds {some(surplus)}, which belong to no Medusa head: another layout, or damaged")


def _check(tensor: Tensor, shape: tuple[int | str, ...], what: str) -> None:
    """Refuse `tensor` when it is not of `shape`, where a word stands for any size, or not of finite floats."""
    real = tuple(tensor.shape)
    if len(shape) != len(real) or any(a != b for a, b in zip(shape, real, strict=True) if isinstance(a, int)):
        raise ValueError(f"{what} must be {list(shape)}, got {list(real)}: heads of different models are mixed")
    if not tensor.is_floating_point():
        raise ValueError(f"{what} must hold floats, got {tensor.dtype}: quantised heads are not read")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{what} holds NaN or infinite values: the file is damaged or training diverged")


def _stack(tensors: Mapping[str, Tensor], names: list[str], heads: int, layers: int) -> Tensor:
    return torch.stack([tensors[name] for name in names]).view(heads, layers, *tensors[names[0]].shape)


def _plain(name: str) -> str:
    return name.removeprefix("medusa_heads.").removeprefix(BESIDE_A_BASE)
