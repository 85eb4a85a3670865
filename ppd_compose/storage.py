"""Files and folders that are there whole or not at all, and the folder for what can be made again.

Knows how to write under a temporary name and rename. Does not know what is written.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """Where this project keeps what it can make again: `$PPD_COMPOSE_HOME`, else the user's cache.

    Raises `OSError` where it is in the user's home, and there is none.
    """
    own, cache = os.environ.get("PPD_COMPOSE_HOME"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(own) if own else Path(cache) / "ppd_compose"
    try:
        return folder.expanduser()
    except RuntimeError as error:
        raise OSError(f"{folder} cannot be found, set PPD_COMPOSE_HOME to a folder: {error}") from None


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success it replaces `target`, on any error it is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = _beside(target)
    staging.touch(exist_ok=False)
    mode = staging.stat().st_mode  # by the user's own mask, which not every writer heeds
    try:
        yield staging
        staging.chmod(mode)
        _sync(staging)
        staging.replace(target)
    finally:
        staging.unlink(missing_ok=True)


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; on success it becomes `target`, which must not exist yet, or be
    an empty folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = _beside(target)
    staging.mkdir()
    try:
        yield staging
        for path in staging.rglob("*"):
            if path.is_file():
                _sync(path)
        if target.is_dir():
            target.rmdir()  # an empty one, which Windows would not replace
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def refuse_unwritable(folder: Path) -> None:
    """Raise `ValueError` when nothing can be written to `folder`, or it cannot be made; what is there stays as it is.

    Of a folder that is not there its nearest parent is tried, so that nothing has to be removed again in which another
    process may write by then.
    """
    places = (folder.absolute(), *folder.absolute().parents)
    place = next((each for each in places if os.path.lexists(each)), folder)
    try:
        if not place.is_dir():
            raise NotADirectoryError(f"{place} is no folder")
        with tempfile.TemporaryDirectory(dir=place, prefix=".") as tried:
            (Path(tried) / "tried").touch()
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror or error}): give another folder") from None


def write_text(target: Path, text: str) -> None:
    """Replace `target` by `text` (UTF-8)."""
    with staged_file(target) as staging:
        staging.write_text(text, encoding="utf-8")


def _beside(target: Path) -> Path:
    """A name that nobody has, with the suffix of `target`."""
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}{target.suffix}")


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
