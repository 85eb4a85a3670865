"""The files of EAGLE heads: official EAGLE-1/2 and EAGLE-3, SpecForge and speculators.

Knows file and tensor names and refuses what is missing, surplus, misshapen or not finite. Nothing is executed: pickles
are read as tensors only. Does not know what the tensors compute, nor how a head is written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from ppd_compose.identity import Identity
from ppd_compose.paired import CARD, read_pair
from ppd_compose.sources import folder_of, read_shards
from ppd_compose.tensor_files import some, tensors_in

from .config import OWN, EagleConfig, parse
from .head import CONFIG, D2T, EMBEDDING, FORMAT, INDEX, KIND, LM_HEAD, T2D, TENSORS, Head
from .network import DraftNetwork

SOURCES = (INDEX, TENSORS, "pytorch_model.bin.index.json", "pytorch_model.bin")
# Copies of the base's own norm and output head, which a training may leave in a speculators file.
COPIES = ("verifier_norm.weight", "verifier_lm_head.weight")


def read_head(source: str | Path, *, revision: str | None = None, token: str | None = None) -> Head:
    """Read the files of a folder or a Hub repository.

    Raises:
        FileNotFoundError: a file is missing, or `source` is neither a folder nor a repository.
        ValueError: a file is damaged or no EAGLE head, or asks for what a head here cannot do.
    """
    folder = _folder(source, revision, token)
    path = _place(folder)
    raw = read_pair(path, CONFIG)
    if not raw:
        raise FileNotFoundError(f"{folder / CONFIG} is missing: an EAGLE head is a folder with {CONFIG} and {TENSORS}")
    tensors = _tensors(path)
    config = parse(raw, set(tensors), str(folder / CONFIG))
    network = _network(tensors, config, path)
    own = raw.get(OWN) or {}
    if own and (not isinstance(own, dict) or own.get("format") != FORMAT):
        raise ValueError(f"{folder / CONFIG}: {OWN!r} is not of format {FORMAT}, which this version reads: {own!r:.80}")
    try:
        identity = Identity(**own["base"]) if own.get("base") else None
        accuracy = tuple(float(share) for share in own.get("accuracy", ()))
        if not isinstance(training := own.get("training", {}), dict):
            raise TypeError(f"training must be an object, got {type(training).__name__}")
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{folder / CONFIG}: a field of {OWN!r} is wrong: {error}") from None
    return Head(
        config, network, tensors.get(EMBEDDING), tensors.get(LM_HEAD), _target_ids(tensors, config, path),
        identity, accuracy, training,
    )  # fmt: skip


def is_head(config: Mapping[str, Any], files: Collection[str]) -> bool:
    """Whether a folder with this configuration and these files holds an EAGLE head.

    The official configurations of EAGLE-1/2 are those of a Llama of one layer: it is a head when there is neither a
    tokenizer nor a generation config, with which models are saved.
    """
    if "speculators_model_type" in config:
        return bool(config["speculators_model_type"] == "eagle3")
    own = config.get(OWN)
    if "draft_vocab_size" in config or (isinstance(own, Mapping) and own.get("kind") == KIND):
        return True
    alone = not any(name.startswith(("tokenizer", "generation_config", "vocab.json")) for name in files)
    return alone and config.get("num_hidden_layers") == 1 and "num_attention_heads" in config


def _folder(source: str | Path, revision: str | None, token: str | None) -> Path:
    """The folder, or the one fetched; pickles are fetched only from a repository without safetensors."""
    patterns, holding = [CONFIG, CARD, "*.safetensors", "*.safetensors.index.json"], f"{CONFIG} and {TENSORS}"
    folder = folder_of(source, patterns, holding, revision, token)
    if not Path(source).is_dir() and not any(folder.glob("*.safetensors")):
        pickles = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
        folder = folder_of(source, [*patterns, *pickles], holding, revision, token)
    return folder


def _place(folder: Path) -> Path:
    """The file of tensors, or the index of several."""
    path = next((folder / name for name in SOURCES if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} holds none of {', '.join(SOURCES)}: fetch or save the head again")
    return path


def _tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a head under the names of `DraftNetwork`."""
    found = dict(_sharded(path) if path.name.endswith(".index.json") else tensors_in(path))
    if not any(name.startswith(("midlayer.", "layers.0.")) for name in found):
        raise ValueError(f"{path} holds no draft layer (midlayer.* or layers.0.*), it is no EAGLE head: {some(found)}")
    renamed = {}
    for name, tensor in found.items():
        for prefix in ("midlayer.", "layers.0."):
            name = f"layer.{name.removeprefix(prefix)}" if name.startswith(prefix) else name
        if name not in COPIES:
            renamed[name] = tensor
    return renamed


def _sharded(index: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of all files that an index names; one that is not where the index says is a `ValueError`."""
    places = read_shards(index)
    for name in sorted(set(places.values())):
        path = index.parent / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, {index.name} names it: fetch or save the head again")
        shard = tensors_in(path)
        if lost := [tensor for tensor, place in places.items() if place == name and tensor not in shard]:
            raise ValueError(f"{path} lacks {some(lost)}, which {index.name} says it holds")
        yield from shard.items()


def _network(tensors: Mapping[str, Tensor], config: EagleConfig, path: Path) -> dict[str, Tensor]:
    """The tensors of the draft network; all of `tensors` are checked for what they must be."""
    try:
        with torch.device("meta"):
            expected = {name: tuple(tensor.shape) for name, tensor in DraftNetwork(config).state_dict().items()}
    except (StrictDataclassError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path.parent / CONFIG} describes a layer that cannot be built: {error}") from None
    allowed = dict(expected)
    allowed[EMBEDDING] = (config.vocab_size, config.hidden_size)
    if config.version == 3:
        allowed[LM_HEAD] = (config.draft_vocab_size, config.hidden_size)
    if config.version == 3 or config.draft_vocab_size != config.vocab_size:
        allowed[D2T], allowed[T2D] = (config.draft_vocab_size,), (config.vocab_size,)
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ValueError(f"{path} lacks {some(missing)}: fetch or save the head again")
    if surplus := sorted(tensors.keys() - allowed.keys()):
        raise ValueError(f"{path} holds {some(surplus)}, which no EAGLE-{config.version} head of its {CONFIG} has")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != allowed[name]:
            raise ValueError(f"{path}: {name} is {tuple(tensor.shape)}, {CONFIG} promises {allowed[name]}")
        if name not in (D2T, T2D) and not (tensor.is_floating_point() and tensor.element_size() > 1):
            raise ValueError(f"{path}: {name} is {tensor.dtype}, a head's weights must be floats of 16 bits or more")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds NaN or infinite values: the file is damaged or training diverged")
    return {name: tensors[name] for name in expected}


def _target_ids(tensors: Mapping[str, Tensor], config: EagleConfig, path: Path) -> Tensor | None:
    """The token of the base that each draft id stands for: id + d2t[id]."""
    d2t, t2d = tensors.get(D2T), tensors.get(T2D)
    if d2t is None:
        if config.draft_vocab_size != config.vocab_size:
            raise ValueError(
                f"{path} lacks d2t: {CONFIG} promises {config.draft_vocab_size} draft tokens of {config.vocab_size}, "
                "and nothing says which"
            )
        return None
    if len(d2t) == config.vocab_size and not d2t.any():
        return None  # then the official code writes both maps, and fills neither
    ids = torch.arange(len(d2t), device="cpu") + d2t.long()
    if len(ids.unique()) < len(ids) or int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size:
        raise ValueError(f"{path}: d2t does not map the draft ids to as many tokens below {config.vocab_size}")
    if t2d is not None and not torch.equal(t2d.bool().nonzero()[:, 0], ids.sort().values):
        raise ValueError(f"{path}: t2d marks other tokens than d2t maps to: the file is damaged")
    return ids
