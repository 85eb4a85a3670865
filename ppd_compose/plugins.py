"""Which plugins take part in a composed model, under which names, and what they may ask of the model.

Knows pluggy. Does not know what the hooks do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import entry_points
from typing import Any

import pluggy
from transformers import PreTrainedModel

from . import hookspecs

MAX_DRAFTERS = 62  # a node's sources are bits of an int64


class Plugins:
    """The drafters and other plugins of one composed model.

    Raises:
        TypeError: an object without a single hook, a misspelt hook, or a hook with an argument that it does not get.
    """

    def __init__(self, drafters: Sequence[Any], others: Sequence[Any]) -> None:
        self.manager = pluggy.PluginManager(hookspecs.PROJECT)
        self.manager.add_hookspecs(hookspecs)
        self.drafters = {self._register(drafter): drafter for drafter in drafters}
        if len(self.drafters) > MAX_DRAFTERS:
            raise ValueError(f"at most {MAX_DRAFTERS} drafters, got {len(self.drafters)}")
        for plugin in others:
            self._register(plugin)
        try:
            self.manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise TypeError(f"{error}; the hooks are those of ppd_compose.hookspecs") from None

    @property
    def hook(self) -> Any:
        """Call a hook of all plugins."""
        return self.manager.hook

    def each_drafter(self, hook: str) -> list[tuple[str, Any, Callable[..., list[Any]]]]:
        """Name, drafter and a caller of its own `hook` (wrappers of others included), in the order given."""
        every = set(self.drafters.values())
        return [
            (name, drafter, self.manager.subset_hook_caller(hook, every - {drafter}))
            for name, drafter in self.drafters.items()
            if hasattr(drafter, hook)
        ]

    def forward_kwargs(self, model: PreTrainedModel) -> dict[str, Any]:
        """What all plugins ask of the model's forward; two values for one keyword are a `ValueError`."""
        merged: dict[str, Any] = {}
        for wanted in self.hook.forward_kwargs(model=model):
            for name, value in wanted.items():
                if merged.setdefault(name, value) != value:
                    raise ValueError(f"two plugins want {name}={merged[name]!r} and {name}={value!r}")
        return merged

    def hooks_of(self, plugin: Any) -> list[str]:
        """Names of the hooks that `plugin` implements."""
        return [caller.name for caller in self.manager.get_hookcallers(plugin) or []]

    def _register(self, plugin: Any) -> str:
        if isinstance(plugin, type):
            raise TypeError(f"{plugin.__name__} is a class: pass an instance of it")
        base = str(getattr(plugin, "name", None) or type(plugin).__name__)
        name = next(n for n in _names(base) if not self.manager.has_plugin(n))
        try:
            self.manager.register(plugin, name)
        except pluggy.PluginValidationError as error:
            raise TypeError(str(error)) from None
        except ValueError:
            raise ValueError(f"{base!r} was given twice: each plugin takes part once") from None
        if not self.hooks_of(plugin):
            raise TypeError(f"{base!r} implements no hook: mark its methods with ppd_compose.hookimpl")
        return name


def _names(base: str) -> Iterator[str]:
    yield base
    number = 2
    while True:
        yield f"{base}-{number}"
        number += 1


def installed() -> dict[str, Any]:
    """Drafters that installed packages offer under the entry point group `ppd_compose`, by name."""
    return {point.name: point.load() for point in entry_points(group=hookspecs.PROJECT)}
