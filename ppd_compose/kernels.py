"""A weight laid out once for the kernel that suits it and this CPU, and the product of rows with it.

Knows oneDNN and FBGEMM, torch's libraries for products on a CPU. Does not know modules, nor when a weight changes.
"""

from __future__ import annotations

import platform
from collections.abc import Callable

import torch
from torch import Tensor

Multiply = Callable[[Tensor], Tensor]

ROWS = 16  # the number of rows that weights are laid out for; others are computed from the same layout
FINE = 2.0**-16  # of a row's largest weight: a 128th of what bfloat16 itself may be off by


def can_multiply(dtype: torch.dtype) -> bool:
    """Whether there is a kernel for laid out weights of `dtype` on this CPU. Those of float16 are left alone where the
    CPU multiplies in it: there nobody has tried what is faster."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype in (torch.float32, torch.bfloat16) or (dtype == torch.float16 and not _native(dtype))


def is_slow(dtype: torch.dtype) -> bool:
    """Whether torch's own product in the half precision `dtype` takes as long for every row here as for the first, and
    that with laid out weights would not. Of ARM nobody has measured it."""
    return can_multiply(dtype) and not _native(dtype) and not _is_arm()


def multiplier(weight: Tensor, bias: Tensor | None) -> Multiply:
    """What makes `rows @ weight.T + bias`, `[..., in]` to `[..., out]`, of rows of the weight's dtype.

    Where the CPU does not multiply in a half precision, numbers are widened to float32 as they are multiplied: by
    FBGEMM, which keeps weights in float16, where that holds all of them; else weights are kept in float32.
    """
    if _native(weight.dtype):
        return _by_onednn(weight, bias)
    wide, wide_bias = weight.float(), None if bias is None else bias.float()
    multiply = _by_fbgemm(wide, wide_bias) if _has_fbgemm() and _fits_float16(wide) else _by_onednn(wide, wide_bias)
    return lambda rows: multiply(rows.float()).to(rows.dtype)


def _native(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies in `dtype` on this CPU, and has fast kernels for laid out weights of it: on ARM those
    of half precision took a hundred times as long as plain ones (pytorch/pytorch#180447)."""
    if _is_arm():
        return dtype == torch.float32
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def _is_arm() -> bool:
    return platform.machine().lower() in ("aarch64", "arm64")


def _has_fbgemm() -> bool:
    quantized = torch.backends.quantized
    return "fbgemm" in quantized.supported_engines and quantized.engine in ("fbgemm", "x86")


def _fits_float16(weight: Tensor) -> bool:
    """Whether float16 holds each row of the float32 `weight` but for a rounding that half precision does not notice."""
    return all(_held(rows) for rows in weight.split(1024))  # a few at a time: a vocabulary's rows are large


def _held(rows: Tensor) -> bool:
    off = rows.to(torch.float16).to(torch.float32).sub_(rows).abs_().amax(1)
    return bool((off <= FINE * rows.abs().amax(1)).all())


def _by_onednn(weight: Tensor, bias: Tensor | None) -> Multiply:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    # By its overload, which takes torch as long to find as the packed weights take us.
    product = torch.ops.mkldnn._linear_pointwise.default
    return lambda rows: product(rows, packed, bias, "none", [], "")


def _by_fbgemm(weight: Tensor, bias: Tensor | None) -> Multiply:
    packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
    product = torch.ops.quantized.linear_dynamic_fp16.default
    return lambda rows: product(rows, packed)
