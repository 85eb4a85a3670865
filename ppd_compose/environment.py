"""Where a result comes from: versions, machine, model, commit, command, date.

Knows how to ask for each. Does not know what was measured.
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .identity import Identity, device_name

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
        "attention": model.config._attn_implementation,
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
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return None
    changes = subprocess.run([*git, "diff", "HEAD"], capture_output=True, check=False).stdout
    mark = f"+changes-{hashlib.sha256(changes).hexdigest()[:8]}" if changes else ""
    return head.stdout.strip() + mark
