"""Prompt tokens as files: `adapter_config.json`, `adapter_model.safetensors` and a model card.

Knows the format and refuses what is not it. Nothing is unpickled or executed. Does not know training or decoding.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .identity import Identity
from .paired import CARD, DIGEST, digest_of, kept_in, write_pair
from .reference import FILES as REFERENCE_FILES
from .reference import TENSORS as REFERENCE_TENSORS
from .reference import is_reference, read_reference
from .sources import folder_of, read_object

FORMAT = 1
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SUFFIX = "ppd_embeddings"
MOST = 256  # prompt tokens, or embeddings of each
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Adapter:
    """What the files hold: rows `[n, v, hidden]` float32, and where known accuracies `[n][rank]` and the base."""

    embeddings: Tensor
    accuracy: list[list[float]] | None
    identity: Identity | None
    training: dict[str, Any] = field(default_factory=dict)  # how they were trained, as plain data


def write_adapter(adapter: Adapter, folder: Path, card: str) -> None:
    """Write `adapter` and its card to `folder`, in the place of what is there whole or not at all.

    Raises `ValueError` for an adapter that names no base.
    """
    n, v, _ = adapter.embeddings.shape
    if adapter.identity is None:
        raise ValueError("prompt tokens that name no base cannot be saved: give identity=Identity.of(base)")
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
        "training": adapter.training,
    }
    rows = adapter.embeddings.flatten(0, 1).float()
    name = f"base_model.model.{adapter.identity.embedding}.{SUFFIX}"
    write_pair({name: rows}, folder / TENSORS, config, CONFIG, card)


def read_adapter(
    source: str | Path, *, revision: str | None = None, token: str | None = None, subfolder: str = ""
) -> Adapter:
    """Read the files of a folder or a Hub repository.

    Raises:
        FileNotFoundError: a file is missing, or `source` is neither a folder nor a repository.
        ValueError: a file is damaged, of another kind, or disagrees with the other.
    """
    wanted = [CONFIG, TENSORS, CARD, *REFERENCE_TENSORS, *REFERENCE_FILES]
    folder = folder_of(source, wanted, f"{CONFIG} and {TENSORS}", revision, token, subfolder)
    config = _read_config(folder / CONFIG)
    if is_reference(config):
        return Adapter(read_reference(folder, config), None, None)
    rows = _read_rows(folder)
    if config.get(DIGEST) != digest_of({SUFFIX: rows}):
        config = _of_these_rows(config, rows, folder)
    n, v, accuracy, identity = _fields(folder / CONFIG, config)
    if rows.shape != (n * v, identity.hidden_size):
        raise ValueError(
            f"{folder / TENSORS} holds {tuple(rows.shape)}, {CONFIG} promises {n} prompt tokens of {v} embeddings "
            f"of {identity.hidden_size}: the two files belong to different adapters"
        )
    training = config.get("training")
    return Adapter(rows.view(n, v, -1), accuracy, identity, training if isinstance(training, dict) else {})


def check_counts(n: object, v: object) -> None:
    """Raise `ValueError` unless there can be `n` prompt tokens of `v` embeddings each."""
    for name, value in (("num_prompt_tokens", n), ("ensemble", v)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r:.60}")
        if value > MOST:
            raise ValueError(f"{name} is more than {MOST}: no forward has so many rows")


def _of_these_rows(config: dict[str, Any], rows: Tensor, folder: Path) -> dict[str, Any]:
    """The config that the tensors' file holds, where it is that of the rows and the one beside it is not: a save was
    cut off. One that belongs to no rows in particular, such as PEFT's, otherwise stays."""
    kept = kept_in(folder / TENSORS, CONFIG)
    if kept.get(DIGEST) == digest_of({SUFFIX: rows}):
        return _checked(kept, folder / TENSORS)
    if config.get(DIGEST) is None:
        return config
    raise ValueError(f"{folder / CONFIG} belongs to other rows than {TENSORS} holds: fetch or save the adapter again")


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: an adapter folder holds {CONFIG} and {TENSORS}")
    config = read_object(path)
    return config if is_reference(config) else _checked(config, path)


def _checked(config: dict[str, Any], path: Path) -> dict[str, Any]:
    if config.get("peft_type") != "PPD":
        raise ValueError(f"{path} is no PPD adapter: peft_type is {config.get('peft_type')!r}")
    if config.get("format_version") != FORMAT:
        raise ValueError(f"{path} has format {config.get('format_version')!r}, this version reads {FORMAT}: upgrade")
    return config


def _fields(path: Path, config: dict[str, Any]) -> tuple[int, int, list[list[float]] | None, Identity]:
    try:
        n, v = config["num_prompt_tokens"], config["ensemble"]
        accuracy, identity = config["accuracy"], Identity(**config["base"])
        check_counts(n, v)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} lacks a field or has one too many: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return n, v, accuracy, identity


def _read_rows(folder: Path) -> Tensor:
    path = folder / TENSORS
    if not path.is_file():
        pickles = [p.name for p in folder.glob("adapter_model.*") if p.suffix in (".bin", ".pt", ".pth")]
        hint = f"; {pickles[0]} is a pickle and is not opened: save it as safetensors" if pickles else ""
        raise FileNotFoundError(f"{path} is missing{hint}")
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            mine = [name for name in names if name.endswith(SUFFIX)]
            rows: Tensor | None = file.get_tensor(mine[0]) if len(mine) == 1 else None
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}): fetch or save the adapter again") from None
    if rows is None or rows.dtype not in FLOATS or rows.ndim != 2:
        raise ValueError(f"{path} must hold one matrix of floats named ...{SUFFIX}, it holds {sorted(names)}")
    return rows.float()
