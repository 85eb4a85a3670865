"""A whole composition as a folder: which drafters with which settings, their files, budget and calibration.

Knows `composition.json`. Each drafter reads and writes its own files in a folder beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from .budget import Budget
from .compose import compose
from .identity import Identity
from .plugins import installed
from .sources import folder_of, read_object
from .storage import write_text

FORMAT = 1
COMPOSITION, CALIBRATION = "composition.json", "calibration.json"
PARTS = ("*.json", "*.safetensors")


def save_composition(model: Any, folder: str | Path) -> None:
    """Write what `compose_from_pretrained` reads; the base's own weights are not saved, only what tells it.

    Args:
        model: a composed one. Plugins other than drafters are not saved.
        folder: gets `composition.json`, `calibration.json`, and a folder for each drafter that has files.

    Raises:
        ValueError: a drafter is of no installed kind, has files but cannot save them, or a name that is no folder's.
    """
    target = Path(folder)
    parts = [_saved(name, drafter, target) for name, drafter in model.plugins.drafters.items()]
    given = model.watch is None and model.budget is not None  # a measured one is that of this machine
    told = {
        "format_version": FORMAT,
        "base": asdict(Identity.of(model)),
        "drafters": parts,
        "budget": asdict(model.budget) if given else None,
    }
    model.save_calibration(target / CALIBRATION)
    write_text(target / COMPOSITION, json.dumps(told, indent=2) + "\n")


def compose_from_pretrained(
    source: str | Path,
    base: PreTrainedModel | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    **settings: Any,
) -> Any:
    """Compose what `save_composition` wrote.

    Args:
        source: folder or Hub id.
        base: the model to compose; loaded by the name that was saved when None.
        revision: branch, tag or commit of a Hub repository.
        token: of the Hub; None takes the one that was stored at login.
        settings: arguments of `compose` that take the place of what was saved.

    Raises:
        FileNotFoundError: no folder or repository, or one without a composition.
        ValueError: it is of another format, damaged, or names a kind of drafter that is not installed.
    """
    patterns = [*PARTS, *(f"*/{pattern}" for pattern in PARTS)]
    folder = folder_of(source, patterns, COMPOSITION, revision, token)
    told = read_composition(folder)
    try:
        identity, budget = Identity(**told["base"]), told["budget"] and Budget.of(told["budget"])
        drafters = [_loaded(part, folder) for part in told["drafters"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / COMPOSITION} lacks a field or has one too many: {error}") from None
    found = folder / CALIBRATION
    kept = {"budget": budget, "calibration": found if found.is_file() else None}
    model: Any = base if base is not None else AutoModelForCausalLM.from_pretrained(identity.name, dtype="auto").eval()
    return compose(model, *drafters, **{**kept, **settings})


def _saved(name: str, drafter: Any, folder: Path) -> dict[str, Any]:
    """Save one drafter; what is told of it."""
    kind = next((kind for kind, made in installed().items() if type(drafter) is made), None)
    if kind is None:
        raise ValueError(f"drafter {name!r} is a {type(drafter).__name__}, no kind that is installed by an entry point")
    if hasattr(type(drafter), "from_pretrained"):
        if not hasattr(drafter, "save_pretrained"):
            raise ValueError(f"drafter {name!r} has files of its own but no save_pretrained: save it beside")
        if Path(name).name != name or name.startswith("."):
            raise ValueError(f"drafter {name!r} needs a name that can be a folder's: set its `name`")
        drafter.save_pretrained(folder / name)
    return {"name": name, "kind": kind, "settings": getattr(drafter, "settings", {})}


def _loaded(part: Mapping[str, Any], folder: Path) -> Any:
    name, kind, settings = str(part["name"]), part["kind"], dict(part["settings"])
    made = installed().get(kind)
    if made is None:
        raise ValueError(f"{folder / COMPOSITION} names a {kind!r}, which is not installed: install what offers it")
    if not hasattr(made, "from_pretrained"):
        drafter = made(**settings)
    elif Path(name).name != name or not (folder / name).is_dir():
        raise FileNotFoundError(f"{folder / COMPOSITION} names {name!r}, which is no folder beside it")
    else:
        drafter = made.from_pretrained(folder / name, **settings)
    drafter.name = name
    return drafter


def read_composition(folder: Path) -> dict[str, Any]:
    """What `composition.json` says. Raises as `compose_from_pretrained`."""
    path = folder / COMPOSITION
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: no composition was saved there")
    told = read_object(path)
    if told.get("format_version") != FORMAT:
        raise ValueError(f"{path} has format {told.get('format_version')!r}, this version reads {FORMAT}: upgrade")
    return told
