"""Draft models as files: a folder or Hub repository with a causal language model in safetensors.

Knows which files such a folder has and which other kinds of folders look alike. Nothing is unpickled or executed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ppd_compose.sources import folder_of

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
VOCABULARY = "tokenizer.json"
PATTERNS = ("model*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
# Keys of heads, of adapters and of drafters that need the base's hidden states.
FOREIGN = (
    "medusa_num_heads", "medusa_num_layers", "draft_vocab_size", "eagle_config", "speculators_model_type", "peft_type",
    "dflash_config", "ppd_compose",
)  # fmt: skip


def is_draft_folder(config: Mapping[str, Any], files: Collection[str]) -> bool:
    """Whether `config` and the names of `files` are those of a causal language model in safetensors."""
    told = config.get("architectures")
    architectures = told if isinstance(told, list) else []
    # The heads of EAGLE-1 and 2 call themselves Llamas of one layer.
    alone = not any(name.startswith("tokenizer") or name == "vocab.json" for name in files)
    eagle = config.get("num_hidden_layers") == 1 and ("bias" in config or alone)
    return (
        any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
        and any(name in files for name in WEIGHTS)
        and not any(key in config for key in FOREIGN)
        and not any(name.startswith("medusa_lm_head") for name in files)
        and not eagle
    )


def load_draft(
    source: str | Path, *, revision: str | None = None, token: str | None = None, dtype: str | torch.dtype = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Model, in evaluation mode with sdpa attention, and tokenizer of a folder or Hub repository.

    Raises:
        FileNotFoundError: no folder or repository, or one without safetensors.
        ValueError: the files are no causal language model.
    """
    folder = draft_folder(source, revision, token)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", use_safetensors=True, trust_remote_code=False
    )
    model.config.name_or_path = str(source)
    return model.eval(), read_tokenizer(folder)


def draft_folder(source: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """The folder itself or the downloaded one. Raises `FileNotFoundError` when it holds no model in safetensors."""
    folder = folder_of(source, PATTERNS, "a model in safetensors", revision, token)
    if not any((folder / name).is_file() for name in WEIGHTS):
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {pickles[0]} is a pickle and is not opened: save it as safetensors" if pickles else ""
        raise FileNotFoundError(f"{folder} has neither {' nor '.join(WEIGHTS)}{hint}")
    return folder


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in `folder`, None when there is none that says which id is which token."""
    file = folder / VOCABULARY
    return _read(file, file.stat().st_mtime_ns) if file.is_file() else None


@lru_cache(maxsize=4)
def _read(file: Path, written: int) -> PreTrainedTokenizerBase:
    """Every composition asks for the base's, which takes long to read."""
    return PreTrainedTokenizerFast(tokenizer_file=str(file))
