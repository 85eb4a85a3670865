"""Tensors and the configuration beside them: two files that are one save, also where the save was cut off between.

The tensors' file holds the configuration too. Knows the two files and who belongs to whom. Does not know what they say.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .sources import read_object
from .storage import staged_file, write_text

DIGEST = "digest"  # of the tensors, in both copies of the configuration
CARD = "README.md"


def write_pair(tensors: Mapping[str, Tensor], place: Path, config: Mapping[str, Any], beside: str, card: str) -> None:
    """Write `tensors` to `place`, and to its folder `card` and, as the file `beside`, `config`; each replaced whole.

    The tensors come first and the configuration last: a save over another that is cut off leaves one of the two, no
    mixture.
    An empty `card` leaves the one that is there.
    Raises `OSError` where a file cannot be written.
    """
    every = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    told = {**config, DIGEST: digest_of(every)}
    with staged_file(place) as staging, writing(place):
        save_file(every, staging, {"format": "pt", beside: json.dumps(told)})
        _put_in_order(staging)
    if card:
        write_text(place.parent / CARD, card)
    write_text(place.parent / beside, json.dumps(told, indent=2) + "\n")


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Let tensors that cannot be written, on a full disk say, be an `OSError` that names `place`."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{place} cannot be written ({error}): make room there, or give another folder") from error


def _put_in_order(place: Path) -> None:
    """Sort what safetensors orders at random, so that the same tensors make the same file."""
    with place.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # as it was, but for the order
            file.seek(8)
            file.write(text.ljust(size))


def read_pair(place: Path, beside: str) -> dict[str, Any]:
    """The configuration of the tensors in `place`: what is beside them, unless their own file says that this belongs to
    others. {} where there is none at all.

    Raises `ValueError` for a configuration that is not JSON.
    """
    told = read_object(place.parent / beside) if (place.parent / beside).is_file() else {}
    kept = kept_in(place, beside)
    return kept if kept.get(DIGEST) not in (None, told.get(DIGEST)) else told


def kept_in(place: Path, beside: str) -> dict[str, Any]:
    """The configuration that a safetensors file holds, {} where it holds none or is no such file."""
    if place.suffix != ".safetensors":
        return {}
    try:
        with safe_open(place, "pt") as file:
            kept = json.loads((file.metadata() or {}).get(beside, "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError):
        return {}  # whoever reads its tensors says what is wrong
    return kept if isinstance(kept, dict) else {}


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Tells `tensors` from others by their numbers, in the order of their names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]
