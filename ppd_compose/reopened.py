"""A saved composition becomes a model again.

Knows which kinds of drafters are installed. What the folder holds is `saved`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from .compose import compose
from .identity import Identity
from .plugins import installed
from .saved import COMPOSITION, is_name, read_composition
from .sources import folder_of

PARTS = ("*.json", "*.safetensors")


def compose_from_pretrained(
    source: str | Path,
    base: PreTrainedModel | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    **settings: Any,
) -> Any:
    """Compose what `save_composition` of a composed model wrote.

    Args:
        source: folder or Hub id.
        base: the model to compose; loaded by the name that was saved when None, never with code of its own.
        revision: branch, tag or commit of a Hub repository.
        token: of the Hub; None takes the one that was stored at login.
        settings: arguments of `compose` that take the place of what was saved.

    Raises:
        FileNotFoundError: no folder or repository, or one without a composition.
        OSError: the base cannot be loaded by its name.
        ValueError: it is of another format, damaged, for another base, or names a kind of drafter that is not
            installed.
    """
    patterns = [*PARTS, *(f"*/{pattern}" for pattern in PARTS)]
    folder = folder_of(source, patterns, COMPOSITION, revision, token)
    told = read_composition(folder)
    identity, budget = told["base"], told["budget"]
    access = {} if token is None else {"token": token}
    drafters = [_loaded(part, folder, access) for part in told["drafters"]]
    model: Any = _named(identity, source, access) if base is None else base
    if (found := Identity.of(model)).shape != identity.shape:
        raise ValueError(f"{source} was composed for {identity}; it cannot be used on {found}")
    if base is None:  # else it is the user's choice, and drafters with files tell of it themselves
        identity.warn_of_other_weights(found, "this composition")
    return compose(model, *drafters, **{"budget": budget, "calibration": told["calibration"], **settings})


def _named(identity: Identity, source: str | Path, access: Mapping[str, str]) -> Any:
    """The base that a composition was saved with, by its name."""
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            identity.name, dtype="auto", trust_remote_code=False, **access
        )
    except OSError as error:
        raise OSError(f"the base of {source}, {identity}, cannot be loaded by its name: give it. {error}") from error
    return model.eval()


def _loaded(part: Mapping[str, Any], folder: Path, access: Mapping[str, str]) -> Any:
    path, inner = folder / COMPOSITION, part["folder"]
    made = installed().get(part["kind"]) if isinstance(part["kind"], str) else None
    if made is None or (hasattr(made, "from_pretrained") and not hasattr(made, "save_pretrained")):
        raise ValueError(f"{path} names a {part['kind']!r}, which is no installed kind that can be saved")
    if not isinstance(part["settings"], dict) or not isinstance(part["name"], str):
        raise ValueError(f"{path} tells no name and settings of its {part['kind']}")
    try:
        if not hasattr(made, "from_pretrained"):
            drafter = made(**part["settings"])
        elif not is_name(inner) or not (folder / inner).is_dir():
            raise FileNotFoundError(f"{path} names {inner!r}, which is no folder beside it")
        else:
            drafter = made.from_pretrained(folder / inner, **part["settings"], **access)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{path} has settings that {part['kind']} does not take: {error}") from None
    drafter.name = part["name"]
    return drafter
