"""Forwards that are compiled once for all models that are built alike.

Knows torch.compile, and what of a model's modules a graph depends on. Does not know trees.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor
from transformers.utils import output_capturing

# What dynamo's guards on modules would look at before every forward, a twentieth of its time.
UNGUARDED = getattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe", None)  # from torch 2.8 on
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, FunctionType)
CALLED = ("_forward_pre_hooks", "_forward_hooks")  # what runs at every forward of a module
TOLD_APART = ("_parameters", "_buffers", "_modules")  # by their names and kinds

# By the way that models are built. As torch does, what was compiled is kept for good.
_graphs: dict[Hashable, Callable[..., Any]] = {}


def compiled(model: Any) -> Callable[..., Any]:
    """The forward of `model`, compiled for any number of rows, as its modules are now.

    Before a forward nobody looks whether they still are: who replaces modules, or sets something in them, calls this
    again. Weights are read at every forward.
    """
    key = _built(model)
    if key not in _graphs:
        # Rounded between operations as an eager forward rounds: in half precision the base's tokens are at stake.
        options = {"emulate_precision_casts": True, **({"guard_filter_fn": UNGUARDED} if UNGUARDED else {})}
        own = _own(type(model).forward, len(_graphs))
        _graphs[key] = torch.compile(own, dynamic=True, options=options)
    return partial(_graphs[key], model)


def _own(forward: Callable[..., Any], number: int) -> Callable[..., Any]:
    """`forward` under a code object of its own, with which torch keeps what it compiles."""

    def run(model: Any, **kwargs: Any) -> Any:
        return forward(model, **kwargs)

    run.__code__ = run.__code__.replace(co_name=f"forward_{number}")
    return run


def _built(model: Any) -> Hashable:
    """All that a graph takes for given: kinds and settings of modules, sizes of tensors, and which are the same."""
    first: dict[int, int] = {}  # which of all that was seen so far is the same
    modules = [
        (name, first.setdefault(id(module), len(first)), type(module), _hooks(module), _settings(module, not name))
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    tensors = [
        (name, first.setdefault(id(tensor), len(first)), *_kind(tensor))
        for named in (model.named_parameters, model.named_buffers)
        for name, tensor in named(remove_duplicate=False)
    ]
    configs = [_frozen(vars(config)) for config in (model.config, model.config.get_text_config())]
    return tuple(modules), tuple(tensors), tuple(configs)


def _hooks(module: Any) -> Hashable:
    """The hooks of `module` but those by which transformers notes hidden states, which is a part of every graph."""
    hooks = [hook for name in CALLED for hook in getattr(module, name, {}).values()]
    return tuple(_Same(hook) for hook in hooks if getattr(hook, "__module__", "") != output_capturing.__name__)


class _Same:
    """An object by its identity. It is held, so that no other one ever gets its number."""

    def __init__(self, held: object) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.held is self.held

    def __hash__(self) -> int:
        return id(self.held)


def _settings(module: Any, outermost: bool) -> Hashable:
    """What else a module holds. The outermost one's `forward` is what is compiled."""
    given = {name: value for name, value in vars(module).items() if name not in TOLD_APART and "hooks" not in name}
    return _frozen({name: value for name, value in given.items() if not (outermost and name == "forward")})


def _frozen(value: Any) -> Hashable:
    """What a graph may have read of `value`: what containers hold, which function it is, else its kind."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Mapping):
        return tuple((_frozen(key), _frozen(held)) for key, held in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    if isinstance(value, set | frozenset):
        return frozenset(map(_frozen, value))
    if isinstance(value, Tensor):
        return _kind(value)
    if isinstance(value, MethodType):
        return value.__func__
    if isinstance(value, partial):
        return _frozen(value.func), _frozen(value.args)
    return cast(Hashable, type(value))


def _kind(tensor: Tensor) -> tuple[Hashable, ...]:
    return type(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.requires_grad
