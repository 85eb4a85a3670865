"""A base model with its tokenizer, by folder, Hub id or the word "demo".

Knows how the command line names bases. Does not compose.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .demo_base import REPO, find_demo_base
from .identity import called
from .sources import undamaged

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class LoadedBase:
    """A model in evaluation mode, its tokenizer, its name on the Hub and in words where it comes from."""

    model: Any
    tokenizer: Any
    name: str
    origin: str


def load_base(source: str, dtype: str = "bfloat16", device: str = "cpu") -> LoadedBase:
    """Load `source` with sdpa attention. Raises `ValueError` for an unknown dtype, damaged files or a device that is
    not there, and `OSError` for an unknown model."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown: take one of {', '.join(DTYPES)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used here: {error}") from None
    place, name, origin = source, called(Path(source)) if Path(source).is_dir() else source, source
    if source == "demo":
        found = find_demo_base()
        place, name, origin = str(found.folder), REPO, found.origin
    with undamaged(source):
        model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=DTYPES[dtype], attn_implementation="sdpa")
    return LoadedBase(model.to(device).eval(), AutoTokenizer.from_pretrained(place), name, origin)
