"""What a compiled graph or a recording of a model takes for given: to compare it, and in words for another process.

Knows modules, their settings and tensors. Does not know torch.compile.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .regions import captures

NUMBERS = (bool, int, float, str, type(None), torch.dtype, torch.device)
PLAIN = (*NUMBERS, FunctionType, BuiltinFunctionType)
CALLED = ("_forward_pre_hooks", "_forward_hooks")  # what runs at every forward of a module
TOLD_APART = ("_parameters", "_buffers", "_modules")  # by their names and kinds


class Wordless(Exception):
    """Something that only this process can tell from others."""


def built(model: Any) -> Hashable:
    """All that a graph of `model` takes for given."""
    return parts(model, ("forward",)), configs(model)  # that is what is compiled


def taken_for_given(model: Any) -> Hashable:
    """All that a recording of what `model` launches takes for given: how it is built, and where its tensors lie."""
    held = (t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor))
    return built(model), tuple(_address(t) for t in (*model.parameters(), *model.buffers(), *held))


def _address(tensor: Tensor) -> Hashable:
    if is_traceable_wrapper_subclass(tensor):
        inner, _ = tensor.__tensor_flatten__()
        return tuple(_address(getattr(tensor, name)) for name in inner)
    return tensor.data_ptr()


def configs(model: Any) -> Hashable:
    return tuple(frozen(vars(config)) for config in (model.config, model.config.get_text_config()))


def parts(module: Any, but: Sequence[str] = ()) -> Hashable:
    """Kinds and settings of `module`, `but` those of these names, and of the modules in it, by what they compute, sizes
    of tensors, which are the same."""
    first: dict[int, int] = {}  # which of all that was seen so far is the same

    def number(one: object) -> int:
        return first.setdefault(id(one), len(first))

    def tensors(one: Any) -> Hashable:
        held = (*one._parameters.items(), *one._buffers.items())
        return tuple([(name, number(tensor), *_kind(tensor)) for name, tensor in held if tensor is not None])

    def told(name: str, one: Any) -> Hashable:
        settings = _settings(one, () if name else but)
        return name, number(one), *_code(type(one)), hooks_of(one), settings, tensors(one)

    return tuple([told(name, one) for name, one in module.named_modules(remove_duplicate=False)])


def hooks_of(module: Any) -> tuple[Hashable, ...]:
    """The hooks of `module` but those by which transformers notes hidden states, which is a part of every graph."""
    hooks = [hook for name in CALLED for hook in getattr(module, name, {}).values()]
    return tuple(Same(hook) for hook in hooks if not captures(hook))


class Same:
    """An object by its identity. It is held, so that no other one ever gets its number."""

    def __init__(self, held: object) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.held is self.held

    def __hash__(self) -> int:
        return id(self.held)


def _code(kind: type) -> tuple[Hashable, ...]:
    """A class of modules, and its forward, which others replace in classes that are not theirs."""
    return kind, frozen(getattr(kind, "forward", None))


def _settings(module: Any, but: Sequence[str]) -> Hashable:
    """What else a module holds."""
    apart = (*TOLD_APART, *but)
    return tuple(
        [(name, frozen(held)) for name, held in vars(module).items() if "hooks" not in name and name not in apart]
    )


def frozen(value: Any) -> Hashable:
    """What a graph may have read of `value`: what containers hold, which function it is, else its kind."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Mapping):
        return tuple((frozen(key), frozen(held)) for key, held in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(frozen, value))
    if isinstance(value, set | frozenset):
        return frozenset(map(frozen, value))
    if isinstance(value, Tensor):
        return _kind(value)
    if isinstance(value, MethodType):
        return value.__func__
    if isinstance(value, partial):
        return frozen(value.func), frozen(value.args), frozen(value.keywords)
    return cast(Hashable, type(value))


def _kind(tensor: Tensor) -> tuple[Hashable, ...]:
    return type(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.requires_grad


def worded(given: Hashable) -> str:
    """What `built`, `parts` or `frozen` gave, in words that are the same in every process.

    Raises `Wordless` where there are none: for a hook, or a function or class that was made within another.
    """
    if isinstance(given, NUMBERS):
        return repr(given)
    if isinstance(given, tuple | frozenset):
        words = [worded(each) for each in given]
        return f"({' '.join(sorted(words) if isinstance(given, frozenset) else words)})"
    if isinstance(given, type | FunctionType | BuiltinFunctionType) and _found_by_its_name(given):
        return f"{given.__module__}.{given.__qualname__}"
    raise Wordless(f"{given!r:.80}")


def _found_by_its_name(given: Any) -> bool:
    found: Any = sys.modules.get(given.__module__ or "")
    for name in given.__qualname__.split("."):
        found = getattr(found, name, None)
    while found is not given and hasattr(found, "__wrapped__"):  # by a decorator, in the place of what it wraps
        found = found.__wrapped__
    return found is given
