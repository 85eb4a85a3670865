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


class Followed:
    """The outermost submodules of a base, which its composition shares: who replaces one of them on the base, as PEFT
    does with an output head that it adapts, means the composition too."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.modules, self.known = base._modules, dict(base._modules)

    def take_up(self, model: Any) -> None:
        """Give `model` those that were replaced since."""
        for name, module in self.modules.items():
            if module is not self.known.get(name):
                model._modules[name] = self.known[name] = module


class Apart:
    """The submodules of a base whose composition has its own over the same parameters: what is done to the base's does
    not reach them, but for what is written to the parameters, and modes."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.modules, self.known = base._modules, active_adapters(base._modules.values())
        self.structure, self.modes = _structure(self.modules), _modes(self.modules)

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
        if _structure(self.modules) != self.structure:
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
