"""What tells one base model from another (shapes, a fingerprint of the input embedding), and one device.

Knows nothing of adapters; they store an `Identity` and compare.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

FINGERPRINT_ROWS = 256
WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # numbers of so many bytes
LARGEST = 2**31  # of a size that is believed


@dataclass(frozen=True)
class Identity:
    """The base that a set of prompt tokens was trained for."""

    name: str
    hidden_size: int
    vocab_size: int
    fingerprint: str
    embedding: str = "model.embed_tokens"  # where the base keeps its input embedding

    def __post_init__(self) -> None:
        """Raises `TypeError` for fields of other types, as files may hold."""
        for name in ("name", "fingerprint", "embedding"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"base.{name} must be a text, got {getattr(self, name)!r:.60}")
        for name in ("hidden_size", "vocab_size"):
            if type(getattr(self, name)) is not int or not 1 <= getattr(self, name) <= LARGEST:
                raise TypeError(f"base.{name} must be a whole number of at least 1, got {getattr(self, name)!r:.60}")

    @classmethod
    def of(cls, model: PreTrainedModel, name: str | None = None) -> Identity:
        """Read the identity off `model`'s input embedding, under `name` or the one in its configuration."""
        module: Any = model.get_input_embeddings()
        path = next(name for name, found in model.named_modules() if found is module)
        weight, known = module.weight, str(model.config.name_or_path)
        if known and Path(known).is_dir():
            known = called(Path(known))  # a folder of one machine tells nobody else anything
        return cls(name or known, weight.shape[1], weight.shape[0], fingerprint(weight), path)

    @property
    def shape(self) -> tuple[int, int]:
        """Vocabulary and hidden size, which prompt tokens and base must share."""
        return self.vocab_size, self.hidden_size

    def warn_of_other_weights(self, base: Identity, what: str) -> None:
        """Warn when `base` is not the one that `what` learnt from, though of the same shapes."""
        if base.fingerprint != self.fingerprint:
            warnings.warn(
                f"{base} has the same shapes but other weights than the base that {what} learnt from (embeddings "
                f"{base.fingerprint}, there {self.fingerprint} of {self.name or 'a base without a name'}): a quantised "
                "copy, say, or a fine-tune. The tokens stay the same, but fewer guesses may be right",
                stacklevel=3,
            )

    def __str__(self) -> str:
        return f"{self.name or 'unnamed base'} (hidden {self.hidden_size}, vocabulary {self.vocab_size})"


def device_name(model: PreTrainedModel) -> str:
    """The device that `model` computes on, as its maker calls it; of a CPU also which instructions torch uses, as one
    name stands for several kinds."""
    if model.device.type in ("cuda", "xpu"):
        name: str = getattr(torch, model.device.type).get_device_name(model.device)
        return name
    if model.device.type != "cpu":
        return model.device.type
    return f"CPU: {_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"


def _cpu_name() -> str:
    """What Linux and macOS tell of the kind of CPU, which of ARM's on Linux is numbers."""
    if sys.platform == "darwin":
        asked = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        return asked.stdout.strip() or platform.machine()
    told: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            what, _, value = line.partition(":")
            told.setdefault(what.strip(), value.strip())
    numbers = " ".join(told[what] for what in ("CPU implementer", "CPU part") if what in told)
    return told.get("model name") or numbers or platform.processor() or platform.machine()


def weights_digest(model: PreTrainedModel) -> str:
    """Hash every parameter, which adapters are active, and how weights were quantised: a fine-tune or a merged adapter
    is another model than its base, which the fingerprint of an input embedding does not tell. Reads all weights."""
    if away := next((name for name, weight in model.named_parameters() if weight.is_meta), None):
        raise ValueError(f"{away} is not in memory, so nothing tells this base from others: load it without offloading")
    embeddings: Any = model.get_input_embeddings()
    digest = hashlib.sha256(fingerprint(embeddings.weight).encode())
    packed = ((name, buffer) for name, buffer in model.named_buffers() if not buffer.is_floating_point())
    weights = ((name, weight.data) for name, weight in model.named_parameters())
    for name, weight in (*weights, *packed):
        for part in _plain(weight):
            digest.update(f"{name} {part.dtype} {tuple(part.shape)} {_row_sums(part)}".encode())
    for fact in (*active_adapters([model]), getattr(model.config, "quantization_config", None) or ""):
        digest.update(str(fact).encode())
    return digest.hexdigest()[:16]


def _plain(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors without a class of their own that `weight` consists of, as far as its class tells them."""
    if type(weight) is torch.Tensor:
        yield weight
    elif is_traceable_wrapper_subclass(weight):
        names, _ = weight.__tensor_flatten__()
        for name in names:
            yield from _plain(getattr(weight, name))


def _row_sums(weight: torch.Tensor) -> list[int]:
    """By row of `weight` `[rows, ...]`, the sum of the bits of its entries as whole numbers."""
    bits: torch.Tensor = weight if weight.dtype == torch.bool else weight.view(WHOLE[weight.element_size()])
    rows = bits.reshape(len(weight), -1) if weight.ndim > 1 else bits.reshape(-1, 1)
    told: list[int] = rows.sum(1, dtype=torch.int64).tolist()
    return told


def active_adapters(modules: Iterable[nn.Module | None]) -> list[str]:
    """Which adapters the layers of `modules` compute with, how strongly, whether they are off and which are merged;
    nothing where there are none."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = (layer for module in modules if module is not None for layer in module.modules())
    tuned: Any = [layer for layer in layers if isinstance(layer, BaseTunerLayer)]
    facts = ("active_adapters", "disable_adapters", "scaling", "merged_adapters")
    return sorted({" ".join(str(getattr(each, fact, None)) for fact in facts) for each in tuned})


def called(folder: Path) -> str:
    """What a folder's model is called: its repository where it lies in the Hub's cache, else the folder's name."""
    place = folder.resolve()
    repository = place.parent.parent.name
    if place.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/", 1)
    return Path(os.path.abspath(folder)).name  # a link's own, which somebody chose


def fingerprint(weight: torch.Tensor) -> str:
    """Hash 256 evenly spaced rows of `weight` `[vocab, hidden]` in bfloat16: float32 and bfloat16 loads agree."""
    rows = torch.linspace(0, weight.shape[0] - 1, FINGERPRINT_ROWS, device="cpu").long().to(weight.device)
    sample = weight.detach()[rows].to(torch.bfloat16).cpu().contiguous()
    return hashlib.sha256(sample.view(torch.int16).numpy().tobytes()).hexdigest()[:16]
