"""Whether a tensor or a linear layer is another one than before, or was written to.

Knows what torch tells of a tensor. Does not know who asks.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def state_of(tensor: Tensor) -> tuple[int, int]:
    """What changes when `tensor` is written in place or given other memory. Tensors of inference mode do not count how
    often they are written, nor do writes by way of `.data`."""
    return 0 if tensor.is_inference() else tensor._version, tensor.data_ptr()


def state_of_layer(layer: Any) -> tuple[Any, ...]:
    """The same of a linear layer's weight and bias, with which tensors, where and of which dtype they are."""
    tensors = [tensor for tensor in (layer.weight, getattr(layer, "bias", None)) if tensor is not None]
    return tuple((id(tensor), *state_of(tensor), tensor.device, tensor.dtype) for tensor in tensors)
