"""An n-gram table as a folder: tensors, the config beside them, and the way from and to the Hub.

Knows files and configs, and refuses what is damaged. Nothing is executed or unpickled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ppd_compose.identity import Identity
from ppd_compose.paired import read_pair, write_pair
from ppd_compose.sources import folder_of

from .table import Table

CONFIG, TENSORS, OWN = "config.json", "ngram.safetensors", "ppd_compose"
FORMAT = 1
DTYPES = {"contexts": torch.int32, "starts": torch.int32, "tokens": torch.int32, "chances": torch.float16}


@dataclass(frozen=True)
class Stored:
    """What a folder holds."""

    table: Table
    identity: Identity | None = None
    accuracy: Sequence[float] = ()
    training: Mapping[str, Any] = field(default_factory=dict)


def read_folder(source: str | Path, *, revision: str | None = None, token: str | None = None) -> Stored:
    """Read a table from a folder or a Hub repository.

    Raises:
        FileNotFoundError: a file is missing, or `source` is no folder and no repository.
        ValueError: a file is damaged or of another format.
    """
    folder = folder_of(source, [CONFIG, TENSORS], TENSORS, revision, token)
    path = folder / TENSORS
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: fetch or save the n-gram table again")
    own = read_pair(path, CONFIG).get(OWN)
    if not isinstance(own, dict) or own.get("format") != FORMAT:
        raise ValueError(f"{folder / CONFIG}: {OWN!r} is not of format {FORMAT}, which this version reads: {own!r:.80}")
    try:
        identity = Identity(**own["base"]) if own.get("base") else None
        accuracy = tuple(float(share) for share in own.get("accuracy", ()))
        return Stored(_table(path), identity, accuracy, dict(own.get("training", {})))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} or its {CONFIG} is damaged: {error}; fetch or save it again") from None


def write_folder(stored: Stored, folder: Path, card: str = "") -> None:
    """Write `stored` and its card to `folder`, in the place of what is there whole or not at all."""
    arrays = {name: getattr(stored.table, name) for name in DTYPES}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)).to(DTYPES[name]) for name, array in arrays.items()}
    own = {
        "kind": "ngram",
        "format": FORMAT,
        "base": None if stored.identity is None else asdict(stored.identity),
        "accuracy": list(stored.accuracy),
        "training": dict(stored.training),
    }
    write_pair(tensors, folder / TENSORS, {OWN: own}, CONFIG, card)


def recognises(files: Iterable[str]) -> bool:
    """Does a folder with these file names hold an n-gram table?"""
    return TENSORS in files


def _table(path: Path) -> Table:
    try:
        found = load_file(path)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(f"no whole file of tensors ({error})") from None
    if found.keys() != DTYPES.keys() or any(found[name].dtype != dtype for name, dtype in DTYPES.items()):
        raise ValueError(f"holds {sorted(found)}, expected {', '.join(f'{n} {d}' for n, d in DTYPES.items())}")
    return Table(*(_array(found[name]) for name in DTYPES))


def _array(tensor: Tensor) -> Any:
    return tensor.double().numpy() if tensor.is_floating_point() else tensor.long().numpy()
