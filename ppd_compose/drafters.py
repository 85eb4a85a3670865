"""Drafters by name, folder or Hub id: which kind is it, and who loads it?

Knows the entry points under which kinds of drafters are installed, and asks each whether a folder is its own. Does not
know any kind.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
)

from .plugins import installed
from .shipped import shipped_drafter
from .sources import asking_the_hub, read_object

CONFIGS = ("adapter_config.json", "config.json")


def load_drafter(source: str | Path, *, revision: str | None = None, token: str | None = None) -> Any:
    """Load a drafter of any installed kind.

    Args:
        source: the name of a shipped drafter ("ppd" and others, for SmolLM2-135M-Instruct), the name of a kind that
            needs no files ("lookup", "recycling"), a folder, or a Hub id. A `Path` is a folder.
        revision: branch, tag or commit of a Hub repository.
        token: of the Hub; None takes the one that was stored at login.

    Raises:
        FileNotFoundError: `source` is no name, folder or reachable repository.
        ValueError: no installed kind knows the files, the one that does refuses them, or a name is a drafter's folder
            here as well.
    """
    kinds = installed()
    name = _name(source, kinds)
    kind, shipped = kinds.get(name), shipped_drafter(name)
    if kind is not None and shipped is not None:
        return kind.from_pretrained(shipped)
    if kind is not None and not hasattr(kind, "from_pretrained"):
        return kind()
    config, files = _contents(source, revision, token, sorted(kinds))
    for name, kind in kinds.items():
        if _recognises(name, kind, config, files):
            return kind.from_pretrained(source, **_given(revision=revision, token=token))
    raise ValueError(
        f"{source} holds {sorted(files)}, which no installed kind of drafter knows: {', '.join(sorted(kinds))}"
    )


def _name(source: str | Path, kinds: Mapping[str, Any]) -> str:
    """`source` where it may be a name, else ""."""
    if isinstance(source, Path):
        return ""
    if source in kinds and any((Path(source) / name).is_file() for name in CONFIGS):
        raise ValueError(
            f"{source!r} is the name of a drafter and a folder here: write './{source}' for the folder, or rename it"
        )
    return source


def _recognises(name: str, kind: Any, config: dict[str, Any], files: set[str]) -> bool:
    """Whether a folder is of that installed kind, by what its class says; one that fails is warned of."""
    try:
        return hasattr(kind, "recognises") and bool(kind.recognises(config, files))
    except Exception as error:
        warnings.warn(
            f"the kind {name!r} of drafters ({kind.__module__}.{kind.__name__}) fails to tell whether a folder is its "
            f"own, and is left out: {type(error).__name__}: {error}",
            stacklevel=3,
        )
        return False


def _given(**values: str | None) -> dict[str, str]:
    return {name: value for name, value in values.items() if value is not None}


def _contents(
    source: str | Path, revision: str | None, token: str | None, names: list[str]
) -> tuple[dict[str, Any], set[str]]:
    """The configuration and the names of the files of a folder or repository."""
    folder = Path(source)
    if isinstance(source, Path) and not folder.is_dir():
        raise FileNotFoundError(f"{source} is no folder: give one, or a Hub id as text")
    if source in names:
        raise FileNotFoundError(f"{source!r} needs files of its own: give their folder or Hub id")
    if not folder.is_dir() or not str(source).strip():
        if str(source).count("/") != 1 or str(source).startswith("."):
            raise FileNotFoundError(f"{source!r} is no drafter's name ({', '.join(names)}), no folder and no Hub id")
        folder, files = _repository(str(source), revision, token)
    else:
        files = {path.name for path in folder.iterdir()}
    for name in CONFIGS:
        if name in files:
            return read_object(folder / name), files
    return {}, files


def _repository(repo: str, revision: str | None, token: str | None) -> tuple[Path, set[str]]:
    """The folder with a repository's configuration, and the names of all its files; what is cached when offline."""
    try:
        files = set(HfApi().list_repo_files(repo, revision=revision, token=token))
        return Path(snapshot_download(repo, revision=revision, token=token, allow_patterns=list(CONFIGS))), files
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(f"{repo} is no folder here and no repository that the Hub shows you: {error}") from None
    except (HTTPError, OSError):
        with asking_the_hub(repo, revision):
            kept = snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=list(CONFIGS))
        return Path(kept), {path.name for path in Path(kept).iterdir()}
