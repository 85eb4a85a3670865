"""A whole composition as a folder: which drafters with which settings, their files, budget and calibration.

Knows `composition.json`. Each drafter writes its own files in a folder beside it; how they become a model again is
`reopened`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from itertools import count
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from .budget import Budget
from .evidence import Evidence
from .identity import Identity
from .plugins import installed
from .sources import read_object
from .storage import write_text

FORMAT = 1
COMPOSITION = "composition.json"


def save_composition(model: Any, folder: str | Path) -> None:
    """Write what `reopened.compose_from_pretrained` reads; the base's own weights are not saved, only what tells it.

    A composition that was saved there before stays until the new one is whole.

    Args:
        model: a composed one. Plugins other than drafters are not saved.
        folder: gets `composition.json` and a folder for each drafter that has files.

    Raises:
        ValueError: a drafter is of no installed kind, has files but cannot save them, or a name that is no folder's.
    """
    target, drafters = Path(folder), model.plugins.drafters
    kinds = {name: _kind(name, drafter) for name, drafter in drafters.items()}
    before = _parts_of(target)
    folders: dict[str, str] = {}
    try:
        for name, drafter in drafters.items():
            if hasattr(drafter, "save_pretrained"):
                folders[name] = _free(target, name)
                drafter.save_pretrained(target / folders[name])
        told = _told(model, kinds, folders)
        write_text(target / COMPOSITION, json.dumps(told, indent=2, default=_number) + "\n")
    except BaseException:  # parts of what is not whole are of no use, and would be pushed
        _remove(target, {*folders.values()} - _parts_of(target))
        raise
    _remove(target, before - {*folders.values()})


def read_composition(folder: Path) -> dict[str, Any]:
    """What `composition.json` says, base and budget as what they are. Raises as `reopened.compose_from_pretrained`."""
    path = folder / COMPOSITION
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: no composition was saved there")
    told = read_object(path)
    if told.get("format_version") != FORMAT:
        raise ValueError(f"{path} has format {told.get('format_version')!r}, this version reads {FORMAT}: upgrade")
    try:
        budget = None if told["budget"] is None else Budget.of(told["budget"])
        # Plain data and no name of a file, which whoever made the folder could choose.
        read = {"base": Identity(**told["base"]), "budget": budget, "calibration": {**told["calibration"]}}
        parts = [{key: part[key] for key in ("name", "kind", "settings", "folder")} for part in told["drafters"]]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is damaged, or lacks a field: {type(error).__name__} {error}") from None
    return {**read, "drafters": parts}


def _kind(name: str, drafter: Any) -> str:
    """The entry point of a drafter that can be saved."""
    kind = next((kind for kind, made in installed().items() if type(drafter) is made), None)
    if kind is None:
        raise ValueError(f"drafter {name!r} is a {type(drafter).__name__}, no kind that is installed by an entry point")
    if hasattr(type(drafter), "from_pretrained") and not hasattr(drafter, "save_pretrained"):
        raise ValueError(f"drafter {name!r} has files of its own but no save_pretrained: compose it by hand")
    if not is_name(name):
        raise ValueError(f"drafter {name!r} needs a name that can be a folder's: set its `name`")
    return kind


def _told(model: Any, kinds: Mapping[str, str], folders: Mapping[str, str]) -> dict[str, Any]:
    """What `composition.json` says of `model`, whose drafters' files lie in `folders`."""
    given = model.watch is None and model.budget is not None  # a measured one is that of this machine
    return {
        "format_version": FORMAT,
        "base": asdict(Identity.of(model)),
        "drafters": [
            {"name": n, "kind": kinds[n], "settings": getattr(each, "settings", {}), "folder": folders.get(n)}
            for n, each in model.plugins.drafters.items()
        ],
        "budget": asdict(model.budget) if given else None,
        "calibration": model.plugins.manager.get_plugin(Evidence.name).learnt(),
    }


def _number(setting: object) -> int | float:
    """A setting that JSON does not know: one of numpy's numbers, say."""
    if isinstance(setting, Integral):
        return int(setting)
    if isinstance(setting, Real):
        return float(setting)
    raise TypeError(f"a drafter's settings hold {setting!r:.60} ({type(setting).__name__}), which JSON cannot tell")


def _free(folder: Path, name: str) -> str:
    """The name of a part that is not there yet."""
    return next(part for n in count() if not (folder / (part := f"{name}-{n}" if n else name)).exists())


def _remove(folder: Path, parts: Iterable[str]) -> None:
    for part in parts:
        shutil.rmtree(folder / part, ignore_errors=True)


def _parts_of(folder: Path) -> set[str]:
    """Folders of the composition that is there, none where there is none."""
    with suppress(ValueError, OSError):
        return {part["folder"] for part in read_composition(folder)["drafters"] if is_name(part["folder"])}
    return set()


def is_name(name: object) -> bool:
    """Whether it names something in a folder and nothing elsewhere."""
    return (
        isinstance(name, str)
        and name != ""
        and Path(name).name == name
        and not name.startswith(".")
        and "\\" not in name
    )
