"""Forwards that are compiled once for all models that are built alike.

Knows torch.compile, and the ways to hand it a model. What a graph depends on is `built`'s. Does not know trees.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from .built import Wordless, built, configs, parts, worded
from .identity import device_name
from .kept import KeptGraph, can_keep, tracing
from .modes import beside
from .regions import Run, Unfit, in_regions, run_layers

# What dynamo's guards on modules would look at before every forward, a twentieth of its time.
UNGUARDED = torch.compiler.skip_guard_on_all_nn_modules_unsafe
# Rounded between operations as an eager forward rounds: in half precision the base's tokens are at stake. Never within
# graphs of the device by inductor: it is us who record them.
OPTIONS: dict[str, Any] = {"emulate_precision_casts": True, "triton.cudagraphs": False}

# By the way that models are built. As torch does, what was compiled is kept for good.
_graphs: dict[Hashable, Callable[..., Any]] = {}
_refused: set[Hashable] = set()  # ways that torch could not go for models that are built so


def compiled(model: Any, regions: bool = False) -> Callable[..., Any]:
    """The forward of `model`, compiled for any number of rows, as its modules are now: by `regions` where they are
    wanted and its layers are alike, else as a whole, and in pieces where torch cannot do that.

    Before a forward nobody looks whether they still are: who replaces modules, or sets something in them, calls this
    again. Weights are read at every forward.
    """
    plain = beside(model)
    vars(plain).pop("forward", None)  # that may be what was compiled before, which is no part of what is
    return partial(_first, [way for way in _ways(plain, built(plain), regions) if way[0] not in _refused])


def _ways(model: Any, key: Hashable, regions: bool) -> Iterator[tuple[Hashable, Callable[..., Any]]]:
    """The ways to compute a forward, and how to tell them apart, the best first."""
    forward = type(model).forward
    if regions and ("regions", key) not in _refused:
        regional = in_regions(model, parts, partial(_region, model))
        if regional is not None:
            yield ("regions", key), partial(forward, regional)
    yield ("whole", key), partial(_told, _graph(_own(forward), ("whole", key), model), model)
    # Pieces are shared by the layers that call the same code, so they have to look at the layer.
    yield ("pieces", key), partial(_told, _in_pieces(_own(forward), ("pieces", key)), model)


def _first(ways: list[tuple[Hashable, Callable[..., Any]]], **kwargs: Any) -> Any:
    """What the first of `ways` gives. One that torch cannot compile is left out from now on, for all models built
    alike.

    Raises `RuntimeError` where it can compile none, as without a compiler.
    """
    while True:
        way, forward = ways[0]
        try:
            return forward(**kwargs)
        except (Unfit, torch._dynamo.exc.TorchDynamoException) as error:
            if len(ways) == 1:
                why = str(error).strip().partition("\n")[0]
                raise RuntimeError(
                    f"torch cannot compile this model's forward here ({why}): install what it lacks, or leave compile "
                    "out (on a CPU packed=True is next in speed)"
                ) from error
            _refused.add(way)
            del ways[0]


def _own(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` in a function of its own, which gives tensors alone, as what is kept can hold no class."""

    def run(model: Any, **kwargs: Any) -> tuple[Any, Any]:
        out = forward(model, **kwargs)
        return out.logits, out.hidden_states

    return run


def _told(graph: Callable[..., Any], model: Any, **kwargs: Any) -> CausalLMOutputWithPast:
    """What `graph`, of a function that `_own` made, says, as a model does."""
    logits, hidden_states = graph(model, **kwargs)
    return CausalLMOutputWithPast(logits=logits, hidden_states=hidden_states)


def _region(model: Any, kind: Hashable) -> Run:
    """`run_layers` compiled for layers of that kind, in models that tell them what `model` does."""

    def run(*args: Any) -> Any:
        return run_layers(*args)

    return _graph(run, ("region", kind, configs(model)), model)


def _graph(run: Any, key: Hashable, model: Any) -> Callable[..., Any]:
    """`run` compiled in one piece or not at all for models that are built like `model`, as `key` tells, and kept where
    that can be. Nobody looks at modules before it runs."""
    graph = _made(run, key, lambda: _keeping(run, key, model))
    if isinstance(graph, KeptGraph):
        graph.look_again()
    return graph


def _in_pieces(run: Any, key: Hashable) -> Callable[..., Any]:
    return _made(run, key, lambda: _traced(torch.compile(run, dynamic=True, options=OPTIONS)))


def _made(run: Any, key: Hashable, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """What `make` makes of `run`, once for each `key`, under a code object of its own, with which torch keeps what it
    compiles."""
    if key not in _graphs:
        run.__code__ = run.__code__.replace(co_name=f"forward_{len(_graphs)}")
        _graphs[key] = make()
    return _graphs[key]


def _keeping(run: Any, key: Hashable, model: Any) -> Callable[..., Any]:
    plain = _traced(_in_one_piece(run, UNGUARDED))
    if not can_keep(model):
        return plain
    machine = (torch.__version__, platform.python_version(), device_name(model), torch.get_num_threads())
    with suppress(Wordless, OSError):  # else graphs last as long as the process
        return KeptGraph(run, partial(_in_one_piece, run), plain, f"{worded(key)} {machine}")
    return plain


def _in_one_piece(run: Any, guards: Any) -> Any:
    return torch.compile(run, dynamic=True, fullgraph=True, options={**OPTIONS, "guard_filter_fn": guards})


def _traced(graph: Callable[..., Any]) -> Callable[..., Any]:
    """`graph`, which torch makes when it is called."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with tracing():
            return graph(*args, **kwargs)

    return run
