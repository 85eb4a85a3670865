"""How verify forwards are computed: as the base does it, with packed weights, compiled, or recorded and played again.

Knows the ways and what each asks of a forward. Does not know trees.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from .cache import leave_a_gap
from .compiled import compiled
from .fixed import memory_of
from .grouped import group, grouped
from .inplace import in_place_layers, lay_in_place, put_in_front
from .kernels import is_slow
from .mask import Attention
from .packed import can_pack, is_packed, pack
from .recorded import STEPS, FixedMemories, can_record, recorded_rows
from .recorders import Recorder, recorders_of

MEASURED_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
REGIONS = "regions"  # of `compile`: by these


@dataclass(frozen=True)
class Forward:
    """A model that is called for verify forwards, and what it wants of them.

    What every forward asks is found once, by searches through the model that take as long as making its mask: it does
    not change while one of these is used, see `forward_of`.
    """

    model: Any
    compiled: bool = False
    regions: bool = False  # it is compiled by regions, where that can be
    memories: FixedMemories = field(default_factory=FixedMemories)  # where its forwards are recorded

    @cached_property
    def device(self) -> torch.device:
        """Where the model is; its first part, where it is spread."""
        where: torch.device = self.model.device
        return where

    @cached_property
    def embed(self) -> nn.Module:
        """Gives the embeddings `[..., hidden]` of tokens."""
        layer: nn.Module = self.model.get_input_embeddings()
        return layer

    @cached_property
    def attention(self) -> Attention:
        """What masks are made for."""
        return Attention.of(self.model)

    def idle(self, rows: int, cache: Cache) -> int:
        """How many rows that mean nothing to add at the end of a forward of `rows` rows.

        Recorded: up to the next size. Compiled: one where there is a single row, or where not every layer is written in
        place, as torch would make a graph of its own for a single row and for keys and values that fill their memory.
        """
        if memory_of(cache) is not None:
            return recorded_rows(rows) - rows
        return int(self.compiled and (rows == 1 or len(in_place_layers(cache)) < len(cache.layers)))

    @contextmanager
    def laid_out(self, cache: Cache, visible: Tensor, prefixes: Sequence[Tensor] = ()) -> Iterator[None]:
        """Within, `cache`, which is written in place, is laid out as it is after a step, behind `prefixes`.

        Args:
            visible: bool `[tokens]`, which of those that are cached are no padding.
        """
        lay_in_place(cache)
        if self.compiled:
            leave_a_gap(cache)
        if prefixes:
            put_in_front(cache, prefixes)
        fixed = self.recorded and len(in_place_layers(cache)) == len(cache.layers)
        with self.memories.lent(self.model, cache, visible) if fixed else nullcontext():
            yield

    @property
    def recorded(self) -> bool:
        """Whether forwards are recorded where the model is now."""
        return self.compiled and can_record(self.model)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of rows between which what a forward takes rises evenly."""
        return STEPS if self.recorded else MEASURED_ROWS

    @property
    def kind(self) -> str:
        """One of "eager", "packed", "compiled", "regions" and "recorded": forwards of one kind cost the same."""
        if self.recorded:
            return "recorded"
        if self.compiled:
            return "regions" if self.regions else "compiled"
        return "packed" if is_packed(self.model) else "eager"


def make_forward(model: Any, base: PreTrainedModel, packed: bool, compile: bool | str) -> Forward:
    """The way that was asked for, made ready for `model`, composed of `base`; its submodules may be replaced.

    Raises `ValueError` when weights cannot be packed here, `compile` is a word that means nothing, or what would be
    packed or compiled is not what the base calls.
    """
    if compile not in (True, False, REGIONS):
        raise ValueError(f'compile is True, False or "{REGIONS}", got {compile!r}')
    if (packed or compile) and "forward" in vars(base):
        raise ValueError(
            "the forward of this base was replaced on the object itself, as accelerate's hooks and patches do; it is "
            "the base's, and a packed or compiled one would pass it by: leave packed and compile out, or load the base "
            "without it"
        )
    if (packed or compile) and getattr(base, "is_loaded_in_8bit", False):
        raise ValueError(
            "layers in 8 bits by bitsandbytes take their weights over from the base, which would have none then: leave "
            "packed and compile out"
        )
    if packed and model.device.type == "cpu" and not torch.backends.mkldnn.is_available():
        warnings.warn(
            "this torch was built without oneDNN, as those for macOS are, so there is nothing to pack weights for: "
            "packed=True changes nothing",
            stacklevel=3,
        )
        packed = False
    if packed or compile:
        _own_modules(model)
        group(model)
    if packed or (compile and can_pack(model)):
        pack(model)
    if not compile:
        _advise(model, packed)
        return Forward(model)
    twin: Any = object.__new__(type(base))
    twin.__dict__.update(vars(model))
    return Forward(twin, compiled=True, regions=compile == REGIONS)


def _advise(model: Any, packed: bool) -> None:
    if not packed and model.device.type == "cpu" and is_slow(model.dtype):
        warnings.warn(
            f"this CPU does not multiply in {model.dtype}, so every further row of a forward takes its time and little "
            "can be gained: compose with packed=True or compile=True, which multiply in float32",
            stacklevel=4,
        )


def forward_of(model: Any) -> Forward:
    """The way that `model` was composed with, as its modules are now; one that was not composed computes as it does.

    To be asked anew for each sequence: in between a model may be moved, or compute attention in another way.
    """
    forward: Forward = vars(model).get("forwards") or Forward(model)
    if forward.compiled:
        vars(forward.model)["forward"] = compiled(forward.model, forward.regions)
    return replace(forward, model=grouped(forward.model) if forward.kind == "eager" else forward.model)


def records(model: Any) -> bool:
    """Whether forwards of `model` are recorded and played again, as those of some compositions are."""
    forward = vars(model).get("forwards")
    return forward is not None and forward.recorded


def recorder_of(model: Any, drafter: Any = None) -> Callable[[], Recorder] | None:
    """Makes what records the forwards of a drafter beside the composed `model`, where those of `model` are recorded;
    None elsewhere. `drafter`: a model of its own, which can be recorded where it is."""
    if not records(model) or not (drafter is None or can_record(drafter)):
        return None
    return recorders_of((model if drafter is None else drafter).device)


def _own_modules(model: Any) -> None:
    """Give `model`, which shares its submodules with a base, submodules of its own over the same parameters.

    What is attached to the base's submodules later, such as an adapter, is not seen.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    model.__dict__["_modules"] = copy.deepcopy(model._modules, {**shared, id(model.config): model.config})
