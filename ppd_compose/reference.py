"""Adapters of the PPD authors' own code (`hmarkc/ppd-*`): PEFT's prompt tuning files with more fields.

Knows their fields and which of them can be honoured. Such files are read and never changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .tensor_files import tensors_in

FILES = ("custom_lm_head.pt", "weighting_layers.pt", "prefix/*")  # asked for, to be refused by name
TENSORS = ("adapter_model.safetensors", "adapter_model.bin")  # the latter is unpickled to tensors and nothing else
KEY = "prompt_embeddings"
OTHERS = {"custom_lm_head.pt": "an output head of its own", "weighting_layers.pt": "weighted ensembles"}


def is_reference(config: Mapping[str, Any]) -> bool:
    """Whether this is the configuration of an adapter of the authors' code, with or without a `peft_type`."""
    return "num_special_tokens" in config and config.get("peft_type") in (None, "PROMPT_TUNING")


def read_reference(folder: Path, config: Mapping[str, Any]) -> Tensor:
    """The embeddings `[n, v, hidden]` float32; row i x v + j of the file is embedding j of prompt token i.

    Raises:
        FileNotFoundError: there are no tensors.
        ValueError: a field or file asks for what is not PPD as published, or files are damaged or disagree.
    """
    path = folder / "adapter_config.json"
    n, v = (config.get(name, 1) for name in ("num_special_tokens", "virtual_tokens_per_special_token"))
    for name, count in (("num_special_tokens", n), ("virtual_tokens_per_special_token", v)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{path}: {name} must be a whole number of at least 1, got {count!r}")
    for fault in _cannot_be_honoured(folder, config, v):
        raise ValueError(f"{path} cannot be read: {fault}; prompt tokens are embeddings and nothing else")
    rows = _rows(folder)
    if rows.ndim != 2 or len(rows) != n * v or not rows.shape[1] or not torch.is_floating_point(rows):
        raise ValueError(f"{path} promises {n} prompt tokens of {v} embeddings, the tensor is {tuple(rows.shape)}")
    return rows.float().reshape(n, v, -1)


def _cannot_be_honoured(folder: Path, config: Mapping[str, Any], ensemble: int) -> list[str]:
    """What this adapter asks for beyond its embeddings, in words."""
    found = [f"{name} holds {what}" for name, what in OTHERS.items() if (folder / name).exists()]
    if config.get("use_prefix_tuning") or (folder / "prefix").exists():
        found.append("it uses prefix tuning")
    if config.get("use_custom_lm_head"):
        found.append("it uses an output head of its own")
    if config.get("num_exits", 1) != 1:
        found.append(f"it uses {config['num_exits']} exits")
    if ensemble > 1 and config.get("aggregation_type", "mean") != "mean":
        found.append(f"its ensembles are aggregated by {config['aggregation_type']!r}")
    if ensemble > 1 and config.get("vt_attention_type", "decoder") != "ensemble":
        found.append(f"its ensembles attend as {config.get('vt_attention_type', 'decoder')!r}")
    return found


def _rows(folder: Path) -> Tensor:
    path = next((folder / name for name in TENSORS if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder / TENSORS[0]} is missing: fetch the adapter again")
    rows = tensors_in(path).get(KEY)
    if rows is None:
        raise ValueError(f"{path} must hold a tensor named {KEY}: it belongs to another kind of adapter")
    if rows.nbytes > path.stat().st_size:
        raise ValueError(f"{path} promises a tensor of {rows.nbytes} bytes, it has fewer: fetch the adapter again")
    return rows
