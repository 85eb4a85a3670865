"""Forwards that are compiled once for all models that are built alike.

Knows torch.compile, and what of a model's modules a graph depends on. Does not know trees.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.utils import output_capturing

from .regions import Run, Unfit, in_regions, run_layers

# What dynamo's guards on modules would look at before every forward, a twentieth of its time.
UNGUARDED = getattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe", None)  # from torch 2.8 on
PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, FunctionType)
CALLED = ("_forward_pre_hooks", "_forward_hooks")  # what runs at every forward of a module
TOLD_APART = ("_parameters", "_buffers", "_modules")  # by their names and kinds

# By the way that models are built. As torch does, what was compiled is kept for good.
_graphs: dict[Hashable, Callable[..., Any]] = {}
_refused: set[Hashable] = set()  # ways that torch could not go for models that are built so


def compiled(model: Any, regions: bool = False) -> Callable[..., Any]:
    """The forward of `model`, compiled for any number of rows, as its modules are now: by `regions` where they are
    wanted and its layers are alike, else as a whole, and in pieces where torch cannot do that.

    Before a forward nobody looks whether they still are: who replaces modules, or sets something in them, calls this
    again. Weights are read at every forward.
    """
    return partial(_first, [way for way in _ways(model, _built(model), regions) if way[0] not in _refused])


def _ways(model: Any, key: Hashable, regions: bool) -> Iterator[tuple[Hashable, Callable[..., Any]]]:
    """The ways to compute a forward, and how to tell them apart, the best first."""
    forward = type(model).forward
    if regions and UNGUARDED and ("regions", key) not in _refused:
        regional = in_regions(model, _parts, partial(_region, _configs(model)))
        if regional is not None:
            yield ("regions", key), partial(forward, regional)
    if UNGUARDED:
        yield ("whole", key), partial(_graph(_own(forward), ("whole", key)), model)
    # Pieces are shared by the layers that call the same code, so they have to look at the layer.
    yield ("pieces", key), partial(_graph(_own(forward), ("pieces", key), whole=False), model)


def _first(ways: list[tuple[Hashable, Callable[..., Any]]], **kwargs: Any) -> Any:
    """By the first of `ways` that torch can go; those that it cannot are left out from now on."""
    while True:
        way, forward = ways[0]
        try:
            return forward(**kwargs)
        except Exception as error:
            if len(ways) == 1 or not isinstance(error, (Unfit, torch._dynamo.exc.TorchDynamoException)):
                raise
            _refused.add(way)
            del ways[0]


def _own(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(model: Any, **kwargs: Any) -> Any:
        return forward(model, **kwargs)

    return run


def _region(known: Hashable, kind: Hashable) -> Run:
    """`run_layers` compiled for layers of that kind, in models of which is `known` what they may read."""

    def run(*args: Any) -> Any:
        return run_layers(*args)

    return _graph(run, (kind, known))


def _graph(run: Any, key: Hashable, whole: bool = True) -> Callable[..., Any]:
    """`run` compiled for what is built like `key`, under a code object of its own, with which torch keeps what it
    compiles; where it is to be `whole`, in one piece or not at all, and then nobody looks at modules before it runs."""
    if key not in _graphs:
        run.__code__ = run.__code__.replace(co_name=f"forward_{len(_graphs)}")
        # Rounded between operations as an eager forward rounds: in half precision the base's tokens are at stake.
        # Never within graphs of the device by inductor: it is us who record them.
        options: dict[str, Any] = {"emulate_precision_casts": True, "triton.cudagraphs": False}
        if whole:
            options["guard_filter_fn"] = UNGUARDED
        _graphs[key] = torch.compile(run, dynamic=True, fullgraph=whole, options=options)
    return _graphs[key]


def _built(model: Any) -> Hashable:
    """All that a graph of `model` takes for given."""
    return _parts(model), _configs(model)


def taken_for_given(model: Any) -> Hashable:
    """All that a recording of what `model` launches takes for given: how it is built, and where its tensors lie."""
    held = (t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor))
    return _built(model), tuple(_address(t) for t in (*model.parameters(), *model.buffers(), *held))


def _address(tensor: Tensor) -> Hashable:
    if is_traceable_wrapper_subclass(tensor):
        inner, _ = tensor.__tensor_flatten__()
        return tuple(_address(getattr(tensor, name)) for name in inner)
    return tensor.data_ptr()


def _configs(model: Any) -> Hashable:
    return tuple(_frozen(vars(config)) for config in (model.config, model.config.get_text_config()))


def _parts(module: Any) -> Hashable:
    """Kinds and settings of `module` and those in it, sizes of tensors, and which are the same."""
    first: dict[int, int] = {}  # which of all that was seen so far is the same
    modules = [
        (name, first.setdefault(id(each), len(first)), type(each), hooks_of(each), _settings(each, not name))
        for name, each in module.named_modules(remove_duplicate=False)
    ]
    tensors = [
        (name, first.setdefault(id(tensor), len(first)), *_kind(tensor))
        for named in (module.named_parameters, module.named_buffers)
        for name, tensor in named(remove_duplicate=False)
    ]
    return tuple(modules), tuple(tensors)


def hooks_of(module: Any) -> tuple[Hashable, ...]:
    """The hooks of `module` but those by which transformers notes hidden states, which is a part of every graph."""
    hooks = [hook for name in CALLED for hook in getattr(module, name, {}).values()]
    return tuple(Same(hook) for hook in hooks if getattr(hook, "__module__", "") != output_capturing.__name__)


class Same:
    """An object by its identity. It is held, so that no other one ever gets its number."""

    def __init__(self, held: object) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.held is self.held

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
