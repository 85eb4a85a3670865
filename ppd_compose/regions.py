"""Layers that are built alike, brought together in regions, so that one graph is compiled for all regions.

Tracing and keeping a graph of every layer takes most of the time and the memory of compiling. Knows how a model's
layers are called, by transformers' conventions. Does not know torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import Cache
from transformers.utils import output_capturing

from .modes import beside

MOST = 10  # layers of a region: each costs time to compile, and each region a tenth of a millisecond at every forward
NUMBER = "layer_idx"  # by what a layer's modules tell the KV cache which of its layers is meant

Run = Callable[..., list[Any]]


class Unfit(Exception):
    """Layers turned out not to be called as those of a region are."""


class Region(nn.Module):
    """Stands in for consecutive layers.

    Args:
        layers: in order, as they were.
        copies: of them, none of which knows its number.
        begin: the number of the first.
        run: `run_layers`, compiled.
    """

    def __init__(self, layers: Sequence[Any], copies: Sequence[Any], begin: int, run: Run) -> None:
        super().__init__()
        # In lists, as their parameters are those of the model and not of a module in it.
        self.layers, self.copies, self.begin, self.run = list(layers), list(copies), begin, run

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the last of the layers returns. What each one returned is captured where that is asked for.

        Raises `Unfit` where the layers are given no KV cache.
        """
        places = (
            [at for at, given in enumerate(args) if isinstance(given, Cache)],
            [name for name, given in kwargs.items() if isinstance(given, Cache)],
        )
        caches: list[Any] = [*(args[at] for at in places[0]), *(kwargs[name] for name in places[1])]
        if not caches:
            raise Unfit("these layers are given no KV cache")
        held = caches[0].layers[self.begin : self.begin + len(self.layers)]
        told = self.run(self.copies, held, places, hidden, args, kwargs)
        for layer, out in zip(self.layers, told, strict=True):
            for hook in layer._forward_hooks.values():
                hook(layer, (hidden,), out)
            hidden = _states(out)
        return told[-1]


class OneLayer:
    """Stands in for a KV cache where only one layer of it can be meant."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As that of a cache, whose layer is known."""
        both: tuple[Tensor, Tensor] = self.layer.update(key_states, value_states)
        return both


class Unnumbered:
    """In place of a layer's number, with which a graph for several layers cannot reckon: whoever tries is told."""

    def _refuse(self, *_: object) -> NoReturn:
        raise TypeError("in a region a layer has no number")

    __eq__ = __hash__ = __bool__ = _refuse


def run_layers(
    layers: Sequence[Callable[..., Any]],
    held: Sequence[Any],
    places: tuple[list[int], list[str]],
    hidden: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> list[Any]:
    """Layer after layer, each with its own layer of the KV cache in the `places` among `args` and `kwargs` where the
    cache was given; what each returned."""
    told = []
    for layer, mine in zip(layers, held, strict=True):
        one = OneLayer(mine)
        given = [one if at in places[0] else arg for at, arg in enumerate(args)]
        named = {name: one if name in places[1] else arg for name, arg in kwargs.items()}
        told.append(layer(hidden, *given, **named))
        hidden = _states(told[-1])
    return told


def _states(told: Any) -> Tensor:
    """The hidden states in what a layer returned."""
    states: Tensor = told[0] if isinstance(told, tuple) else told
    return states


def in_regions(model: Any, kind: Callable[[Any], Hashable], run: Callable[[Hashable], Run]) -> Any | None:
    """`model` in a structure beside its own, over the same parameters, whose layers stand together in regions; None
    where they are not all alike.

    Args:
        kind: tells modules apart for which other graphs are needed.
        run: gives `run_layers`, compiled for layers of that kind.
    """
    config = model.config.get_text_config()
    count = getattr(config, "num_hidden_layers", 0)
    if getattr(config, "sliding_window", None):
        return None  # layers with a window and without are given masks of their own; of windows alone nobody has tried
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count > 1]
    if len(found) != 1:
        return None
    name, layers = found[0]
    if _share_tensors(layers):
        return None  # which inputs of a graph are the same would be told for one region, and be taken for all
    copies = [_unnumbered(layer) or layer for layer in layers]
    kinds = {kind(layer) for layer in copies}
    if len(kinds) > 1 or any(m._forward_hooks or m._forward_pre_hooks for copy in copies for m in copy.modules()):
        return None
    size = max(n for n in range(1, MOST + 1) if count % n == 0)
    compiled, originals = run((size, *kinds)), list(layers)
    regions = [Region(originals[i : i + size], copies[i : i + size], i, compiled) for i in range(0, count, size)]
    return _with(model, name.split("."), nn.ModuleList(regions))


def _share_tensors(layers: Iterable[nn.Module]) -> bool:
    each = [{id(tensor) for tensor in (*layer.parameters(), *layer.buffers())} for layer in layers]
    return len(set().union(*each)) < sum(map(len, each))


def _unnumbered(module: Any) -> Any:
    """A copy of `module` over the same parameters where it or one in it has a number or captures what it returns, and
    the copy does not; else None."""
    inner = {name: _unnumbered(child) for name, child in module._modules.items()}
    hooks = {key: hook for key, hook in module._forward_hooks.items() if not captures(hook)}
    if NUMBER not in vars(module) and len(hooks) == len(module._forward_hooks) and not any(inner.values()):
        return None
    modules = {name: inner[name] or child for name, child in module._modules.items()}
    made = beside(module, _modules=modules, _forward_hooks=hooks)
    if NUMBER in vars(module):
        made.__dict__[NUMBER] = Unnumbered()
    return made


def captures(hook: Any) -> bool:
    """Whether `hook` is one by which transformers notes hidden states."""
    return getattr(hook, "__module__", "") == output_capturing.__name__


def _with(module: Any, path: Sequence[str], replacement: nn.Module) -> Any:
    """A copy of `module` over the same parameters with `replacement` at `path`."""
    name, *rest = path
    inner = _with(module._modules[name], rest, replacement) if rest else replacement
    return beside(module, _modules={**module._modules, name: inner})
