"""`compose(base, *drafters)`: a model of the base's own class that decodes with the drafters.

Knows how two models share weights. How the result generates is `generation`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .accept import MatchPicks
from .budget import Budget
from .drafters import load_drafter
from .evidence import Evidence
from .followed import Apart, Followed
from .forward import make_forward
from .generation import Composed
from .mask import refuse_attention
from .measured import Watch
from .plugins import Plugins, name_of
from .refuse import refuse_base
from .rows import BestRows
from .sources import read_object
from .stats import Stats


def compose(
    base: PreTrainedModel,
    *drafters: Any,
    budget: Budget | int | None = None,
    plugins: Sequence[Any] = (),
    packed: bool = False,
    compile: bool | str = False,
    calibration: str | Path | Mapping[str, Any] | None = None,
) -> Any:
    """Return a model that generates the tokens of `base`, several in one forward.

    Args:
        base: any decoder-only model with full or sliding-window attention, in sdpa or eager. Never modified.
        drafters: objects that guess the next tokens, such as `PromptTokens`, or what `load_drafter` takes: a name, a
            folder or a Hub id. None at all decodes plainly.
        budget: how many rows one forward may verify: measured on this machine when None (seconds, once, at the
            first generation, then kept in the user's cache), at most so many when an integer, or a `Budget`.
        plugins: other objects with hooks, none that drafts: another `merge`, `fit` or `accept`, an observer.
        packed: keep the weights of linear layers a second time, laid out for the CPU's kernels: the same results,
            up to rounding, sooner, for as much memory again as those weights. Those of draft heads likewise. What is
            written to the weights later is seen at the next generation, by a few numbers of each. On a CPU that does
            not multiply in half precision, such as one without AVX-512, only this or `compile` makes several rows
            cheap for a base that is in it.
        compile: compile the verify forward by `torch.compile`, on a CPU with packed weights. The first forwards take
            minutes, or seconds where a graph was kept by an earlier process; see `warmup`. "regions" compiles layers
            that are alike once: sooner and in less memory, while each forward takes a millisecond longer. On one CUDA
            device they are recorded then in a few sizes, as CUDA graphs. Modules that are replaced or set otherwise in
            the midst of a generation are seen at the next one.
        calibration: how far the drafters' claims can be believed: a file that `save_calibration` of a composition of
            the same drafters wrote, or what it holds. Learnt anew while decoding when None.

    Returns:
        An instance of the base's own class that shares its weights. `stats` tells what the last generation did.

    Raises:
        TypeError: `base` is no transformers model, drafters come as a list, `budget` is something else, or for an
            object as `Plugins` says.
        OSError: a drafter or the calibration is given by name, folder or file, and cannot be read or found.
        ValueError: the base is a composition already or cannot verify a candidate tree, a drafter was made for another
            base, two have one name, a budget is of no row, weights cannot be packed where the base is, `compile` is
            another word, or the calibration is that of other drafters.
    """
    if isinstance(base, Composed):
        raise ValueError("the base is a composition already: compose its own base, with all drafters at once")
    refuse_base(base)
    refuse_attention(base)
    given = _budget(budget)
    watch = Watch() if given is None else None
    others = plugins if watch is None else [*plugins, watch]
    loaded = composition([_drafter(each) for each in drafters], others, calibration)
    loaded.hook.prepare(model=base)
    model = _sharing(base)
    model.forwards = make_forward(model, base, packed, compile)
    model.followed = Apart(base) if packed or compile else Followed(base)
    model.plugins, model.stats = loaded, Stats(tuple(loaded.drafters))
    model.budget, model.watch = given, watch
    return model


def _drafter(given: Any) -> Any:
    if isinstance(given, list | tuple | set | dict):
        raise TypeError(f"drafters are given one by one, compose(base, *drafters), got a {type(given).__name__}")
    return load_drafter(given) if isinstance(given, str | Path) else given


def _budget(given: Any) -> Budget | None:
    if given is None or isinstance(given, Budget):
        return given
    if isinstance(given, bool) or not isinstance(given, Integral):
        raise TypeError(f"budget is the most rows of a forward, a Budget or None to measure it, got {given!r:.60}")
    return Budget.flat(int(given))


def composition(
    drafters: Sequence[Any], plugins: Sequence[Any], calibration: str | Path | Mapping[str, Any] | None = None
) -> Plugins:
    """All plugins of a composed model: those given, and the defaults, which come last where one result counts."""
    names = [name_of(drafter) for drafter in drafters]
    return Plugins(drafters, [*plugins, _evidence(names, calibration), MatchPicks(), BestRows()])


def _evidence(names: Sequence[str], calibration: str | Path | Mapping[str, Any] | None) -> Evidence:
    if calibration is None:
        return Evidence(names)
    if isinstance(calibration, Mapping):
        return Evidence.restored(names, calibration, "the calibration given")
    return Evidence.restored(names, read_object(Path(calibration)), str(calibration))


def _sharing(base: PreTrainedModel) -> Any:
    """A second model object over the same parameters and submodules.

    Its own dictionaries, so that nothing set on it reaches the base; its own generation config for the same
    reason. The class keeps the base's name, which transformers writes into and reads from configurations.
    """
    kind = type(base)
    model: Any = object.__new__(type(kind.__name__, (Composed, kind), {"__module__": kind.__module__}))
    kinds = (dict, set, list)
    own = {name: copy.copy(value) if isinstance(value, kinds) else value for name, value in vars(base).items()}
    own.pop("generate", None)  # a model loaded with custom_generate carries one bound to the base
    model.__dict__.update(own)
    model.generation_config = copy.deepcopy(base.generation_config)
    return model
