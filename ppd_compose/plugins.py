"""Which plugins take part in a composed model, under which names, and what they may ask of the model.

Knows pluggy. Does not know what the hooks do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any

import pluggy
from torch import Tensor
from transformers import PreTrainedModel

from . import hookspecs
from .prefix import check_prefix

DRAFTERS = hookspecs.PROJECT  # entry point group: name -> drafter class
TRAINING = f"{hookspecs.PROJECT}.train"  # entry point group: name -> function with typer's options
DRAFTS = ("propose", "extend", "append", "prefix", "foretell")  # hooks of drafters alone
MAX_DRAFTERS = 62  # a node's sources are bits of an int64


class Plugins:
    """The drafters and other plugins of one composed model.

    Raises:
        TypeError: an object without a single hook, a misspelt hook, a hook with an argument that it does not get, a
            method with the name of a hook that is not marked as one, an object that cannot be hashed, or one among the
            others that drafts.
        ValueError: more than `MAX_DRAFTERS`, two of one name, or an object that was given twice.
    """

    def __init__(self, drafters: Sequence[Any], others: Sequence[Any]) -> None:
        self.manager = pluggy.PluginManager(hookspecs.PROJECT)
        self.manager.add_hookspecs(hookspecs)
        self.drafters = {self._register(drafter): drafter for drafter in drafters}
        if len(self.drafters) > MAX_DRAFTERS:
            raise ValueError(f"at most {MAX_DRAFTERS} drafters, got {len(self.drafters)}")
        for plugin in others:
            self._refuse_drafts(self._register(plugin), plugin)
        try:
            self.manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise TypeError(f"{error}; the hooks are those of ppd_compose.hookspecs") from None

    @property
    def hook(self) -> Any:
        """Call a hook of all plugins."""
        return self.manager.hook

    @property
    def bits(self) -> dict[str, int]:
        """By name of a drafter its bit in the sources of nodes and rows."""
        return {name: 1 << i for i, name in enumerate(self.drafters)}

    def each_drafter(self, hook: str) -> list[tuple[str, Any, Callable[..., list[Any]]]]:
        """Name, drafter and a caller of its own `hook` (wrappers of others included), in the order given."""
        every = set(self.drafters.values())
        return [
            (name, drafter, self.manager.subset_hook_caller(hook, every - {drafter}))
            for name, drafter in self.drafters.items()
            if hasattr(drafter, hook)
        ]

    def observers(self) -> tuple[list[tuple[str, Callable[..., Any]]], Callable[..., Any]]:
        """Callers of `observe`: by name each drafter's own, and that of all other plugins."""
        every, drafters = set(self.manager.get_plugins()), self.drafters
        own: list[tuple[str, Callable[..., Any]]] = [
            (name, self.manager.subset_hook_caller("observe", every - {drafter}))
            for name, drafter in drafters.items()
            if hasattr(drafter, "observe")
        ]
        return own, self.manager.subset_hook_caller("observe", set(drafters.values()))

    def forward_kwargs(self, model: PreTrainedModel) -> dict[str, Any]:
        """What all plugins ask of the model's forward; two values for one keyword are a `ValueError`."""
        merged: dict[str, Any] = {}
        for wanted in self.hook.forward_kwargs(model=model):
            for name, value in wanted.items():
                if name == "output_hidden_states":
                    raise ValueError("a plugin asks for hidden states by the hook hidden_layers, not by forward_kwargs")
                if (held := merged.setdefault(name, value)) is not value and held != value:
                    raise ValueError(f"two plugins want {name}={merged[name]!r} and {name}={value!r}")
        return merged

    def hidden_layers(self, model: PreTrainedModel) -> list[int]:
        """Which hidden states the plugins need, ascending; one that `model` does not have is a `ValueError`."""
        wanted = {layer for layers in self.hook.hidden_layers(model=model) for layer in layers}
        last = model.config.get_text_config().num_hidden_layers
        if wrong := sorted(wanted - set(range(last + 1))):
            raise ValueError(f"hidden states {wrong} were asked for, {type(model).__name__} has those of 0 to {last}")
        return sorted(wanted)

    def prefixes(self) -> dict[int, Tensor]:
        """What rows that drafters append see before the sequence, by the drafters' bits."""
        bits, callers = self.bits, self.each_drafter("prefix")
        return {bits[name]: check_prefix(told[0], name) for name, _, prefix in callers if (told := prefix())}

    def hooks_of(self, plugin: Any) -> list[str]:
        """Names of the hooks that `plugin` implements."""
        return [caller.name for caller in self.manager.get_hookcallers(plugin) or []]

    def _register(self, plugin: Any) -> str:
        if isinstance(plugin, type):
            raise TypeError(f"{plugin.__name__} is a class: pass an instance of it")
        name = name_of(plugin)
        if type(plugin).__hash__ is None:
            raise TypeError(f"{name!r} cannot be a key of step.memory: make it a @dataclass(eq=False)")
        if self.manager.has_plugin(name) and self.manager.get_plugin(name) is not plugin:
            raise ValueError(f"two plugins are named {name!r}: set the `name` of one of them to something else")
        try:
            self.manager.register(plugin, name)
        except pluggy.PluginValidationError as error:
            raise TypeError(str(error)) from None
        except ValueError:
            raise ValueError(f"{name!r} was given twice: each plugin takes part once") from None
        hooks = self.hooks_of(plugin)
        if not hooks:
            raise TypeError(f"{name!r} implements no hook: mark its methods with ppd_compose.hookimpl")
        for hook in sorted(vars(self.manager.hook).keys() - hooks):
            if callable(getattr(plugin, hook, None)):
                raise TypeError(
                    f"{name!r} has a method {hook}, which is a hook's name, but nobody would call it: mark it with "
                    f"ppd_compose.hookimpl, give it another name, or leave out what is inherited by {hook} = None"
                )
        return name

    def _refuse_drafts(self, name: str, plugin: Any) -> None:
        """Raise `TypeError` when `plugin`, which is no drafter, drafts: nobody would know whose guesses those are. It
        may wrap what drafters do."""
        callers = (caller for caller in self.manager.get_hookcallers(plugin) or [] if caller.name in DRAFTS)
        for caller in callers:
            own = (impl for impl in caller.get_hookimpls() if impl.plugin is plugin)
            if not all(impl.wrapper or impl.hookwrapper for impl in own):
                raise TypeError(
                    f"{name!r} drafts, by its {caller.name}: give it to compose as a drafter, not in plugins"
                )


def name_of(plugin: Any) -> str:
    """Its `name`, or that of its class."""
    return str(getattr(plugin, "name", None) or type(plugin).__name__)


def installed(group: str = DRAFTERS) -> dict[str, Any]:
    """What installed packages offer under an entry point group, by name; one that fails to load is warned of."""
    found = {}
    for point in entry_points(group=group):
        try:
            found[point.name] = point.load()
        except Exception as error:
            warnings.warn(
                f"entry point {point.name!r} ({point.value}) of group {group!r} cannot be loaded and is left out: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )
    return found
