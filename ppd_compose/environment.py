"""Where a result comes from: versions, machine, model, commit, command, date.

Knows how to ask for each. Does not know what was measured.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .identity import Identity, device_name
from .mask import implementation

CHOICES = ("TORCH_CUDNN_SDPA_DEPRIORITIZED", "MALLOC_MMAP_THRESHOLD_")  # variables that change what is measured
PACKAGES = ("ppd_compose", "torch", "transformers", "peft", "accelerate", "numpy")


def environment(model: PreTrainedModel, command: str) -> dict[str, Any]:
    """Provenance of a measurement on `model`, as plain data."""
    identity = Identity.of(model)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "device": device_name(model),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": implementation(model),
        **{name: os.environ[name] for name in CHOICES if name in os.environ},
        "model": identity.name,
        "fingerprint": identity.fingerprint,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, with a mark where it was changed since."""
    try:
        # An environment may lie within another project's checkout, which then knows nothing of this file.
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        head, changes = _git("rev-parse", "HEAD").decode().strip(), _git("diff", "HEAD")
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return None
    return head + (f"+changes-{hashlib.sha256(changes).hexdigest()[:8]}" if changes else "")


def _git(*words: str) -> bytes:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    return subprocess.run(command, capture_output=True, check=True).stdout
