"""Where a drafter's files are: a folder, or a Hub repository of which the needed files are fetched; and their JSON.

Knows folders, the Hub and JSON. Does not know what any file means, and neither executes nor unpickles one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError


def folder_of(
    source: str | Path,
    patterns: Sequence[str],
    holding: str,
    revision: str | None = None,
    token: str | None = None,
    subfolder: str = "",
) -> Path:
    """`source` itself when it is a folder, else the folder that its files of these `patterns` were fetched to; of
    either the `subfolder`.

    Raises:
        FileNotFoundError: `source` cannot be a Hub id either; says what a folder must be `holding`.
        ValueError: `subfolder` leads out of it.
    """
    folder, name, inner = Path(source), str(source), PurePosixPath(subfolder)
    if inner.is_absolute() or ".." in inner.parts:
        raise ValueError(f"subfolder {subfolder!r} leads out of {name}: name one inside")
    if folder.is_dir():
        return folder / inner
    if name.count("/") > 1 or name.startswith((".", "/")):
        raise FileNotFoundError(f"{name} is no folder: give a folder with {holding}, or a Hub id")
    wanted = [str(inner / pattern) for pattern in patterns]
    with asking_the_hub(name, revision):
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=wanted)) / inner


@contextmanager
def asking_the_hub(repo: str, revision: str | None) -> Iterator[None]:
    """Let whatever the Hub or the way to it refuses be an `OSError` that names the repository and what can be done;
    `FileNotFoundError` where there is none, or none that it shows."""
    try:
        yield
    except HFValidationError:
        raise FileNotFoundError(f"{repo!r} is no folder here, and cannot be a Hub id: that is owner/name") from None
    except (HTTPError, OSError) as error:
        kind = FileNotFoundError if isinstance(error, RepositoryNotFoundError) else OSError
        where = repo if revision is None else f"{repo} at revision {revision}"
        raise kind(
            f"{where}: {error}; check the name, what the token may see (hf auth login) and the connection"
        ) from error


@contextmanager
def undamaged(source: str | Path) -> Iterator[None]:
    """Let a model's files that cannot be read be a `ValueError` that names `source`."""
    try:
        yield
    except (SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"{source} is damaged ({error}): fetch or save it again") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Raises `FileNotFoundError` when there is no file, and `ValueError` when it holds anything else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: fetch or save it again")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch or save it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, an object was expected: fetch or save it again")
    return value


def read_shards(index: Path) -> dict[str, str]:
    """By the name of a tensor the file beside `index` that holds it.

    Raises `ValueError` when `index` maps nothing, or to other places than beside it.
    """
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or any(Path(str(name)).name != name for name in places.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files beside it: fetch or save it again")
    return places
