"""Medusa heads as a folder: which file holds them, the config beside it, and the way from and to the Hub.

Knows files and configs. Tensors and their names are `layouts`. Only Medusa's own `.pt` and `.bin` are unpickled, and
of them tensors alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ppd_compose.paired import read_pair, write_pair
from ppd_compose.sources import folder_of, read_shards
from ppd_compose.tensor_files import tensors_in

from .heads import Heads
from .layouts import read_tensors, wanted, write_tensors
from .prompt_heads import FACTS, TENSORS, PromptHeads, read_prompt_heads, write_prompt_heads

CONFIG, HEADS, WHOLE = "config.json", "medusa_lm_head.safetensors", "model.safetensors"
INDEX = ".index.json"
# Heads alone come before a whole checkpoint, and a format that cannot hold code before one that can.
NAMES = (HEADS, "medusa_lm_head.pt", WHOLE + INDEX, WHOLE, "pytorch_model.bin" + INDEX, "pytorch_model.bin")
OWN = "ppd_compose"  # what configs of other programs do not hold


@dataclass(frozen=True)
class Stored:
    """What a folder holds: the heads, the name of their base where it is told, and what this project adds."""

    heads: Heads
    base_name: str = ""
    own: Mapping[str, Any] = field(default_factory=dict)
    prompt_heads: PromptHeads | None = None


def read_folder(source: str | Path, *, revision: str | None = None, token: str | None = None) -> Stored:
    """Read heads from a folder or a Hub repository, of which no more than the files with heads is fetched.

    Raises:
        FileNotFoundError: no file with heads, a shard that is missing, or `source` is no folder and no repository.
        ValueError: a file is damaged or holds other tensors than its layout and config promise.
    """
    folder = _folder(source, revision, token)
    path = _heads_file(folder)
    config = read_pair(path, CONFIG)
    layout, heads = read_tensors(_load(path), str(path), one_output=bool(config.get("original_lm_head")))
    _check_config(config, heads, layout, folder / CONFIG)
    own = config.get(OWN, {})
    if not isinstance(own, dict):
        raise ValueError(f"{folder / CONFIG}: {OWN} must be an object, got {type(own).__name__}")
    training = own.get("training") or {}
    if not isinstance(training, dict):
        raise ValueError(f"{folder / CONFIG}: training of {OWN} must be an object, got {type(training).__name__}")
    vocab = config.get("vocab_size")
    if vocab is not None and (not isinstance(vocab, int) or vocab < 1):
        raise ValueError(f"{folder / CONFIG}: vocab_size must be a whole number of at least 1, got {vocab!r}")
    try:
        heads = replace(heads, vocab_size=vocab)
    except ValueError as error:
        raise ValueError(f"{path} does not fit the vocab_size {vocab} of {CONFIG}: {error}") from None
    return Stored(heads, str(config.get("base_model_name_or_path") or ""), own, read_prompt_heads(folder))


def write_folder(stored: Stored, folder: Path, layout: str, card: str = "") -> None:
    """Write `stored` and its card to `folder`, in the place of what is there whole or not at all.

    Raises `ValueError` when `folder` holds other heads, which would be read instead.
    """
    name = HEADS if layout == "official" else WHOLE
    if others := [other for other in NAMES[: NAMES.index(name)] if (folder / other).exists()]:
        raise ValueError(f"{folder} holds {others[0]}, which would be read instead of {name}: give another folder")
    tensors = write_tensors(stored.heads, layout)
    config = {"official": _official, "vllm": _vllm}[layout](stored)
    write_prompt_heads(stored.prompt_heads, folder)
    write_pair(tensors, folder / name, {**config, OWN: dict(stored.own)}, CONFIG, card)


def recognises(config: Mapping[str, Any], files: Iterable[str]) -> bool:
    """Does a folder with this config (or {}) and these file names hold Medusa heads?"""
    return (
        config.get("model_type") == "medusa"
        or config.get("architectures") == ["MedusaModel"]
        or "medusa_num_heads" in config
        or any(name in NAMES[:2] for name in files)
    )


def _official(stored: Stored) -> dict[str, Any]:
    heads = stored.heads
    return {
        "medusa_num_heads": len(heads),
        "medusa_num_layers": heads.weight.shape[1],
        "base_model_name_or_path": stored.base_name,
        **({} if heads.outputs else {"version": "2"}),
        "hidden_size": heads.hidden_size,
        "vocab_size": heads.vocabulary,
    }


def _vllm(stored: Stored) -> dict[str, Any]:
    heads = stored.heads
    return {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "base_model_name_or_path": stored.base_name,
        "num_heads": len(heads),
        "num_hidden_layers": heads.weight.shape[1],
        "hidden_size": heads.hidden_size,
        "vocab_size": heads.vocabulary,
        "truncated_vocab_size": heads.entries,
        "medusa_fc_bias": heads.bias is not None,
        "original_lm_head": len(heads.outputs) == 1,
    }


def _check_config(config: Mapping[str, Any], heads: Heads, layout: str, path: Path) -> None:
    """Is the file what the config says? `medusa_num_heads` is not asked: the first published configs have it wrong."""
    real: dict[str, Any] = {"hidden_size": heads.hidden_size}
    if layout == "vllm":
        real |= {"num_heads": len(heads), "num_hidden_layers": heads.weight.shape[1], "logit_scale": 1.0}
        vocab = config.get("vocab_size")
        real["truncated_vocab_size"] = vocab if heads.token_map is None else len(heads.token_map)
        if heads.token_map is not None and config.get("truncated_vocab_size") is None:
            raise ValueError(f"{path} lacks truncated_vocab_size, beside a token_map of {len(heads.token_map)} entries")
    for name, value in real.items():
        if config.get(name, value) not in (None, value):
            raise ValueError(f"{path} says {name} {config[name]}, the tensors say {value}: files of different heads")


def _heads_file(folder: Path) -> Path:
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} holds no Medusa heads: expected one of {', '.join(NAMES)}")


def _load(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that belong to heads, or of the shards that an index names."""
    if not path.name.endswith(INDEX):
        return tensors_in(path, wanted)
    places = read_shards(path)
    found: dict[str, Tensor] = {}
    for shard in sorted({places[name] for name in wanted(places)}):
        if not (path.parent / shard).is_file():
            raise FileNotFoundError(f"{path.parent / shard} is missing, {path.name} names it: fetch the folder again")
        found |= tensors_in(path.parent / shard, wanted)
    if missing := sorted(set(wanted(places)) - found.keys()):
        raise ValueError(f"{path} promises {missing[0]}, {places[missing[0]]} lacks it: fetch the folder again")
    return found


def _folder(source: str | Path, revision: str | None, token: str | None) -> Path:
    """The folder, or the one fetched with the first of `NAMES` there is; of a sharded one, the shards that matter."""
    holding = f"{HEADS} or {WHOLE}"
    for name in NAMES:
        folder = folder_of(source, [CONFIG, name, TENSORS, FACTS], holding, revision, token)
        if (folder / name).is_file():
            break
    if name.endswith(INDEX) and folder != Path(source):
        places = read_shards(folder / name)
        folder_of(source, sorted({places[key] for key in wanted(places)}), holding, revision, token)
    return folder
