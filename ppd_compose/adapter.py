"""Prompt tokens as files: `adapter_config.json`, `adapter_model.safetensors` and a model card.

Knows the format and refuses what is not it. Nothing is unpickled or executed. Does not know training or decoding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .identity import Identity
from .sources import folder_of, read_object
from .storage import staged_file, write_text

FORMAT = 1
CONFIG, TENSORS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
SUFFIX = "ppd_embeddings"


@dataclass(frozen=True)
class Adapter:
    """What the files hold: rows `[n, v, hidden]` float32, accuracies `[n][rank]` where they are known, and the base."""

    embeddings: Tensor
    accuracy: list[list[float]] | None
    identity: Identity


def write_adapter(
    adapter: Adapter, folder: Path, *, training: Mapping[str, Any] | None = None, card: str | None = None
) -> None:
    """Write `adapter` to `folder`; each file is replaced whole, the config last."""
    n, v, _ = adapter.embeddings.shape
    config = {
        "peft_type": "PPD",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "format_version": FORMAT,
        "base_model_name_or_path": adapter.identity.name,
        "num_prompt_tokens": n,
        "ensemble": v,
        "base": asdict(adapter.identity),
        "accuracy": adapter.accuracy,
        "training": dict(training or {}),
    }
    rows = adapter.embeddings.flatten(0, 1).float().cpu().contiguous()
    with staged_file(folder / TENSORS) as staging:
        save_file({f"base_model.model.{adapter.identity.embedding}.{SUFFIX}": rows}, staging, {"format": "pt"})
    if card is not None:
        write_text(folder / CARD, card)
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def read_adapter(
    source: str | Path, *, revision: str | None = None, token: str | None = None, subfolder: str = ""
) -> Adapter:
    """Read the files of a folder or a Hub repository.

    Raises:
        FileNotFoundError: a file is missing, or `source` is neither a folder nor a repository.
        ValueError: a file is damaged, of another kind, or disagrees with the other.
    """
    folder = folder_of(source, [CONFIG, TENSORS, CARD], f"{CONFIG} and {TENSORS}", revision, token, subfolder)
    n, v, accuracy, identity = _fields(folder / CONFIG, _read_config(folder / CONFIG))
    rows = _read_rows(folder)
    if rows.shape != (n * v, identity.hidden_size):
        raise ValueError(
            f"{folder / TENSORS} holds {tuple(rows.shape)}, {CONFIG} promises {n} prompt tokens of {v} embeddings "
            f"of {identity.hidden_size}: the two files belong to different adapters"
        )
    return Adapter(rows.view(n, v, -1), accuracy, identity)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: an adapter folder holds {CONFIG} and {TENSORS}")
    config = read_object(path)
    if config.get("peft_type") != "PPD":
        raise ValueError(f"{path} is no PPD adapter: peft_type is {config.get('peft_type')!r}")
    if config.get("format_version") != FORMAT:
        raise ValueError(f"{path} has format {config.get('format_version')!r}, this version reads {FORMAT}: upgrade")
    return config


def _fields(path: Path, config: dict[str, Any]) -> tuple[int, int, list[list[float]] | None, Identity]:
    try:
        n, v = config["num_prompt_tokens"], config["ensemble"]
        accuracy, identity = config["accuracy"], Identity(**config["base"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} lacks a field or has one too many: {error}") from None
    for name, value in (
        ("num_prompt_tokens", n),
        ("ensemble", v),
        ("base.hidden_size", identity.hidden_size),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{path}: {name} must be a whole number of at least 1, got {value!r}")
    return n, v, accuracy, identity


def _read_rows(folder: Path) -> Tensor:
    path = folder / TENSORS
    if not path.is_file():
        pickles = [p.name for p in folder.glob("adapter_model.*") if p.suffix in (".bin", ".pt", ".pth")]
        hint = f"; {pickles[0]} is a pickle and is not opened: save it as safetensors" if pickles else ""
        raise FileNotFoundError(f"{path} is missing{hint}")
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}): fetch or save the adapter again") from None
    found = [tensor for name, tensor in tensors.items() if name.endswith(SUFFIX)]
    if len(found) != 1 or not torch.is_floating_point(found[0]):
        raise ValueError(f"{path} must hold one tensor of floats named ...{SUFFIX}, it holds {sorted(tensors)}")
    return found[0]
