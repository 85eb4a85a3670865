"""Files that hold tensors by name, from folders and repositories that nobody vouches for.

Knows safetensors and torch's pickles, of which tensors alone are read, so that nothing is executed. Does not know what
the tensors are for.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

FEW = 4  # names that a message lists
HOLDS = os.name == "nt"  # whether the system lets no file be replaced of which something is in use


def tensors_in(path: Path, wanted: Callable[[Iterable[str]], Iterable[str]] = list) -> dict[str, Tensor]:
    """The `wanted` tensors, by name, of a file: safetensors by its suffix, else one that `torch.save` wrote.

    Raises `ValueError` for a file that is damaged or holds anything else, and `OSError` for one that cannot be opened.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: _apart(file.get_tensor(name)) for name in wanted(file.keys())}
        held: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, MemoryError):  # of the machine, not of the file
        raise
    except Exception as error:  # an unpickler of tensors alone raises whatever the bytes lead it to
        raise ValueError(f"{path} is no whole file of tensors ({error}): fetch or save it again") from None
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        raise ValueError(f"{path} must hold tensors by name, got {type(held).__name__}: it is a file of something else")
    if repeated := [name for name, value in held.items() if not _lies_whole(value)]:
        raise ValueError(f"{path}: {repeated[0]} promises more entries than the file holds: fetch it again")
    return {name: _apart(held[name]) for name in wanted(held)}


def some(names: Iterable[str]) -> str:
    """A few of `names`, for a message, and how many more there are."""
    listed = sorted(names)
    more = f" and {len(listed) - FEW} more" if len(listed) > FEW else ""
    return ", ".join(listed[:FEW]) + more or "nothing"


def _apart(tensor: Tensor) -> Tensor:
    """`tensor`, which lies in a file; a copy where else that file could not be replaced."""
    return tensor.clone() if HOLDS else tensor


def _lies_whole(tensor: Tensor) -> bool:
    """Whether every entry of `tensor` has a place of its own in memory: a pickle of kilobytes may hold one that repeats
    an entry, and takes gigabytes as soon as anything is computed of it."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return plain and tensor.nbytes <= tensor.untyped_storage().nbytes()
