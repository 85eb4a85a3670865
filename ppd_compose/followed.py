"""What a composition takes up of what is done to its base meanwhile.

Knows submodules and the adapters that PEFT puts on them. Does not know how a composition shares weights.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .built import Same, hooks_of
from .identity import active_adapters
from .packed import look_again
from .regions import captures

FORWARD = "forward"
HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)  # fmt: skip


class Followed:
    """The outermost submodules of a base, which its composition shares: who replaces one of them on the base, as PEFT
    does with an output head that it adapts, means the composition too. So does who hooks into the base itself, or
    replaces its forward."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.modules, self.known = base._modules, dict(base._modules)
        self.own = vars(base)
        self.called = _called(self.own)

    def take_up(self, model: Any) -> None:
        """Give `model` those that were replaced since, and what was put on the base or taken off it."""
        for name, module in self.modules.items():
            if module is not self.known.get(name):
                model._modules[name] = self.known[name] = module
        called, self.called = self.called, _called(self.own)
        for place, key in called.keys() - self.called.keys():
            _place(model, place).pop(key, None)
        for (place, key), thing in self.called.items():
            if thing is not called.get((place, key)):
                _place(model, place)[key] = thing


class Apart:
    """The submodules of a base whose composition has its own over the same parameters: what is done to the base's does
    not reach them, but for what is written to the parameters, and modes."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.modules, self.known = base._modules, active_adapters(base._modules.values())
        self.structure, self.modes = _structure(self.modules), _modes(self.modules)
        self.own, self.called = vars(base), _called(vars(base))

    def take_up(self, model: Any) -> None:
        """Let `model` be in training or evaluation mode where the base has changed it, and its weights be packed anew
        where they were written.

        Raises `ValueError` when other adapters are active than when `model` was composed, or modules, parameters or
        hooks are others.
        """
        kind = type(model).__name__
        if (now := active_adapters(self.modules.values())) != self.known:
            raise ValueError(
                f"this {kind} was composed with packed or compile when the base had the adapters {self.known}; now "
                f"they are {now}, and its own layers do not follow: compose anew, or without the two"
            )
        if _structure(self.modules) != self.structure or _called(self.own) != self.called:
            raise ValueError(
                f"this {kind} was composed with packed or compile, and modules, parameters or hooks of the base are "
                "others since, as after resize_token_embeddings or load_state_dict(assign=True); its own layers do not "
                "follow: compose anew, or without the two"
            )
        if (modes := _modes(self.modules)) != self.modes:
            self.modes = modes
            for name, module in _named(model._modules):
                module.training = modes.get(name, module.training)
        look_again(model)


def _called(own: Mapping[str, Any]) -> dict[tuple[str, Hashable], Any]:
    """By place and key what runs at a call of the module whose attributes are `own`, beside its class: hooks, and a
    forward of its own."""
    hooks = {(place, key): hook for place in HOOKS for key, hook in own[place].items() if not captures(hook)}
    return hooks | ({("", FORWARD): own[FORWARD]} if FORWARD in own else {})


def _place(model: Any, place: str) -> dict[Any, Any]:
    held: dict[Any, Any] = vars(model)[place] if place else vars(model)
    return held


def _structure(modules: Mapping[str, nn.Module | None]) -> list[tuple[Hashable, ...]]:
    """Which modules, parameters and hooks there are."""
    return [(Same(module), *map(Same, module._parameters.values()), *hooks_of(module)) for _, module in _named(modules)]


def _modes(modules: Mapping[str, nn.Module | None]) -> dict[str, bool]:
    """By the name of a module whether it is in training mode."""
    return {name: module.training for name, module in _named(modules)}


def _named(modules: Mapping[str, nn.Module | None]) -> Iterator[tuple[str, nn.Module]]:
    for name, module in modules.items():
        if module is not None:
            yield from module.named_modules(prefix=name)
