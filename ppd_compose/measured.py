"""The budget measured on this machine, kept in the user's cache.

Knows what a measurement depends on. How it is measured is `budget`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .budget import MEASURED_ROWS, Budget
from .forward import forward_of
from .identity import Identity, device_name
from .storage import cache_folder


def measured_budget(model: PreTrainedModel) -> Budget:
    """Load the budget of `model` on this device, or measure and keep it."""
    path = _path(model)
    if path.exists():
        return Budget.load(path)
    budget = Budget.measure(model)
    budget.save(path)
    return budget


def _path(model: PreTrainedModel) -> Path:
    """One file for each thing that changes the seconds of a forward."""
    device = device_name(model)
    threads = torch.get_num_threads() if model.device.type == "cpu" else 0
    identity = Identity.of(model)
    layers = model.config.get_text_config().num_hidden_layers
    facts = [
        identity.fingerprint,
        layers,
        device,
        str(model.dtype),
        model.config._attn_implementation,
        threads,
        forward_of(model).kind,
        MEASURED_ROWS,
    ]
    key = hashlib.sha256(json.dumps([*facts, torch.__version__]).encode()).hexdigest()[:16]
    return cache_folder() / "budgets" / f"{key}.json"
