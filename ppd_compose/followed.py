"""What a composition takes up of what is done to its base meanwhile.

Knows submodules and the adapters that PEFT puts on them. Does not know how a composition shares weights.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from .identity import active_adapters


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
    """The adapters of a base whose composition has submodules of its own: what PEFT does to the base's does not reach
    them."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.modules, self.known = base._modules, active_adapters(base._modules.values())

    def take_up(self, model: Any) -> None:
        """Raise `ValueError` when other adapters are active than when `model` was composed."""
        if (now := active_adapters(self.modules.values())) != self.known:
            raise ValueError(
                f"this {type(model).__name__} was composed with packed or compile when the base had the adapters "
                f"{self.known}; now they are {now}, and its own layers do not follow: compose anew, or without the two"
            )
