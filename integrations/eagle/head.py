"""A head as data, and how it is written: in the official layout of its version, our facts in the configuration.

Knows file and tensor names. Does not know other layouts, nor what the tensors compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppd_compose.identity import Identity
from ppd_compose.paired import write_pair

from .config import LAYER_IDS, OWN, EagleConfig

KIND, FORMAT = "eagle", 1
CONFIG, TENSORS = "config.json", "model.safetensors"
INDEX = f"{TENSORS}.index.json"
EMBEDDING, LM_HEAD, D2T, T2D = "embed_tokens.weight", "lm_head.weight", "d2t", "t2d"


@dataclass(frozen=True)
class Head:
    """What the files hold."""

    config: EagleConfig
    network: dict[str, Tensor]  # as `DraftNetwork` names them
    embedding: Tensor | None = None  # [vocab, hidden]; None: the base's
    lm_head: Tensor | None = None  # [draft vocab, hidden]; None: the base's rows `target_ids`
    target_ids: Tensor | None = None  # int64 [draft vocab], the token that each draft id stands for; None: itself
    identity: Identity | None = None  # the base that the head was trained for
    accuracy: tuple[float, ...] = ()  # by depth, how often the first guess was right after a right prefix
    training: Mapping[str, Any] = field(default_factory=dict)


def write_head(head: Head, folder: Path, *, card: str = "") -> None:
    """Write `head` in the official layout of its version, our facts in the configuration; in the place of one that is
    there whole or not at all.

    Raises as `refuse_index`.
    """
    refuse_index(folder)
    config, prefix = head.config, "midlayer." if head.config.version == 3 else "layers.0."
    tensors = {prefix + n.removeprefix("layer.") if n.startswith("layer.") else n: t for n, t in head.network.items()}
    tensors |= {n: t for n, t in ((EMBEDDING, head.embedding), (LM_HEAD, head.lm_head)) if t is not None}
    if head.target_ids is not None:
        chosen = torch.zeros(config.vocab_size, dtype=torch.bool, device=head.target_ids.device)
        chosen[head.target_ids] = True
        tensors |= {
            D2T: head.target_ids - torch.arange(len(head.target_ids), device=head.target_ids.device),
            T2D: chosen,
        }
    write_pair(tensors, folder / TENSORS, _plain(head), CONFIG, card)


def refuse_index(folder: Path) -> None:
    """Raise `ValueError` when `folder` holds the index of a sharded head, which would be read instead of one written
    there."""
    if (folder / INDEX).exists():
        raise ValueError(f"{folder} holds {INDEX}, which would be read instead of {TENSORS}: give another folder")


def _plain(head: Head) -> dict[str, Any]:
    """The configuration of the official layout, with our facts under a key of their own."""
    config = head.config
    flags = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    plain = {
        "architectures": ["LlamaForCausalLMEagle3" if config.version == 3 else "LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "vocab_size": config.vocab_size,
        **config.layer,
        "qkv_bias": "qkv" in config.biases,
        "mlp_bias": "mlp" in config.biases,
        **{name: True for name in flags if getattr(config, name)},
        OWN: {
            "kind": KIND,
            "format": FORMAT,
            "version": config.version,
            "base": None if head.identity is None else asdict(head.identity),
            "accuracy": list(head.accuracy),
            "training": dict(head.training),
        },
    }
    if config.draft_vocab_size != config.vocab_size or config.version == 3:
        plain["draft_vocab_size"] = config.draft_vocab_size
    if config.version == 1:
        return {**plain, "bias": "fc" in config.biases}
    if config.layers is not None:
        plain[LAYER_IDS] = list(config.layers)
    if config.state_size != config.hidden_size:
        plain["target_hidden_size"] = config.state_size
    return plain
