"""Prompt tokens as files: `adapter_config.json`, `adapter_model.safetensors` and a model card.

Knows the format and refuses what is not it. Nothing is unpickled or executed. Does not know training or decoding.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .identity import Identity
from .paired import CARD, DIGEST, digest_of, kept_in, write_pair
from .prefix import EIGHT_BITS, as_prefix, in_eight_bits
from .reference import FILES as REFERENCE_FILES
from .reference import TENSORS as REFERENCE_TENSORS
from .reference import is_reference, read_reference
from .sources import folder_of, read_object
from .tensor_files import tensors_in

FORMAT, WITH_PREFIX = 1, 2  # whoever knows but the first must not read the rows of the second without their prefix
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SUFFIX = "ppd_embeddings"
PREFIX = f"{SUFFIX}_prefix"
MOST = 256  # prompt tokens, or embeddings of each
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Adapter:
    """What the files hold: rows `[n, v, hidden]`, and where known accuracies `[n][rank]` and the base."""

    embeddings: Tensor
    accuracy: list[list[float]] | None
    identity: Identity | None
    training: dict[str, Any] = field(default_factory=dict)  # how they were trained, as plain data
    prefix: Tensor | None = None  # [layers, 2, key heads, columns, head_dim]

    @property
    def format(self) -> int:
        return FORMAT if self.prefix is None else WITH_PREFIX

    @property
    def prefix_shape(self) -> list[int] | None:
        """What a configuration says of the prefix."""
        return None if self.prefix is None else list(self.prefix.shape)


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
        "format_version": adapter.format,
        "base_model_name_or_path": adapter.identity.name,
        "num_prompt_tokens": n,
        "ensemble": v,
        "prefix": adapter.prefix_shape,
        "base": asdict(adapter.identity),
        "accuracy": adapter.accuracy,
        "training": adapter.training,
    }
    tensors = {SUFFIX: adapter.embeddings.flatten(0, 1)}
    if adapter.prefix is not None:
        whole = bool(torch.equal(in_eight_bits(adapter.prefix), adapter.prefix))
        tensors[PREFIX] = adapter.prefix.to(EIGHT_BITS) if whole else adapter.prefix
    place = f"base_model.model.{adapter.identity.embedding}"
    write_pair({f"{place}.{name}": held for name, held in tensors.items()}, folder / TENSORS, config, CONFIG, card)


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
    tensors = _read_tensors(folder)
    if config.get(DIGEST) != digest_of(tensors):
        config = _of_these_tensors(config, tensors, folder)
    n, v, accuracy, identity = _fields(folder / CONFIG, config)
    rows, prefix, promised = tensors[SUFFIX], tensors.get(PREFIX), config.get("prefix")
    if rows.shape != (n * v, identity.hidden_size):
        raise ValueError(
            f"{folder / TENSORS} holds {tuple(rows.shape)}, {CONFIG} promises {n} prompt tokens of {v} embeddings "
            f"of {identity.hidden_size}: the two files belong to different adapters"
        )
    training = config.get("training")
    read = Adapter(rows.view(n, v, -1), accuracy, identity, training if isinstance(training, dict) else {}, prefix)
    if read.prefix_shape != promised or read.format != config["format_version"]:
        raise ValueError(
            f"{folder / TENSORS} holds a prefix of {read.prefix_shape}, {CONFIG} promises {promised!r:.60} in format "
            f"{config['format_version']}: the two files belong to different adapters"
        )
    return read if prefix is None else replace(read, prefix=as_prefix(prefix))


def check_counts(n: object, v: object) -> None:
    """Raise `ValueError` unless there can be `n` prompt tokens of `v` embeddings each."""
    for name, value in (("num_prompt_tokens", n), ("ensemble", v)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r:.60}")
        if value > MOST:
            raise ValueError(f"{name} is more than {MOST}: no forward has so many rows")


def _of_these_tensors(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> dict[str, Any]:
    """The config that the tensors' file holds, where it is that of the tensors and the one beside it is not: a save
    was cut off. One that belongs to no tensors in particular, such as PEFT's, otherwise stays."""
    kept = kept_in(folder / TENSORS, CONFIG)
    if kept.get(DIGEST) == digest_of(tensors):
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
    if config.get("format_version") not in (FORMAT, WITH_PREFIX):
        raise ValueError(
            f"{path} has format {config.get('format_version')!r}, this version reads those up to {WITH_PREFIX}: upgrade"
        )
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


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Rows `[n * v, hidden]` and, where there is one, the prefix, by the ends of their names."""
    path = folder / TENSORS
    if not path.is_file():
        pickles = [p.name for p in folder.glob("adapter_model.*") if p.suffix in (".bin", ".pt", ".pth")]
        hint = f"; {pickles[0]} is a pickle and is not opened: save it as safetensors" if pickles else ""
        raise FileNotFoundError(f"{path} is missing{hint}")
    found = tensors_in(path)
    mine = [name for name in found if name.endswith((SUFFIX, PREFIX))]
    tensors = {name.rpartition(".")[2]: found[name] for name in mine}
    known = {SUFFIX: FLOATS, PREFIX: (*FLOATS, EIGHT_BITS)}
    sizes = {name: held.ndim for name, held in tensors.items() if held.dtype in known.get(name, ())}
    if len(mine) != len(sizes) or sizes not in ({SUFFIX: 2}, {SUFFIX: 2, PREFIX: 5}):
        raise ValueError(
            f"{path} must hold one matrix of floats named ...{SUFFIX}, and may hold a prefix of five dimensions named "
            f"...{PREFIX}, it holds {sorted(found)}"
        )
    return tensors
