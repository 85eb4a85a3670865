"""Draft models as files: a folder or Hub repository with a causal language model in safetensors, or a note of where
one is.

Knows which files such a folder has and which other kinds of folders look alike. Nothing is unpickled or executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ppd_compose import PromptTokens
from ppd_compose.identity import active_adapters
from ppd_compose.sources import folder_of, read_object, undamaged
from ppd_compose.storage import staged_folder

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
VOCABULARY = "tokenizer.json"
ORIGIN, PROMPTS = "draft_origin.json", "prompt_tokens"
PATTERNS = (
    "model*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", f"{PROMPTS}/*.safetensors",
)  # fmt: skip
COMMIT = re.compile("[0-9a-f]{40}")
# Keys of heads, of adapters and of drafters that need the base's hidden states.
FOREIGN = (
    "medusa_num_heads", "medusa_num_layers", "draft_vocab_size", "eagle_config", "speculators_model_type", "peft_type",
    "dflash_config", "ppd_compose",
)  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """The repository on the Hub that a draft model was loaded from, and its commit."""

    source: str
    revision: str


@dataclass(frozen=True)
class Draft:
    """What a folder holds. With an origin the model is not in it, and the tokenizer only if it is another."""

    model: Any  # in evaluation mode with sdpa attention
    tokenizer: PreTrainedTokenizerBase | None
    prompt_tokens: PromptTokens | None = None
    origin: Origin | None = None


def is_draft_folder(config: Mapping[str, Any], files: Collection[str]) -> bool:
    """Whether `config` and the names of `files` are those of a causal language model in safetensors."""
    if ORIGIN in files:
        return True
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
) -> Draft:
    """What a folder or Hub repository holds.

    Raises:
        FileNotFoundError: no folder or repository, or one without safetensors.
        ValueError: the files are no causal language model, or damaged.
    """
    told = folder_of(source, PATTERNS, "a model in safetensors", revision, token)
    origin = _origin(told, source)
    folder = told if origin is None else draft_folder(origin.source, origin.revision, token)
    with undamaged(folder):
        model: Any = AutoModelForCausalLM.from_pretrained(
            _with_weights(folder),
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
        )
    model.config.name_or_path = str(source) if origin is None else origin.source
    prompts = PromptTokens.from_pretrained(told / PROMPTS) if (told / PROMPTS).is_dir() else None
    return Draft(model.eval(), read_tokenizer(told) or read_tokenizer(folder), prompts, origin)


def save_draft(draft: Draft, folder: Path) -> None:
    """Write what `load_draft` reads: of a model that came from the Hub where it is, and of others all weights.

    Raises `FileExistsError` when `folder` holds something, and `ValueError` for prompt tokens that name no base, or a
    model whose layers carry PEFT adapters.
    """
    if active_adapters([draft.model]):
        raise ValueError(
            "the draft model carries adapters, which a folder of its weights would lose: merge them (merge_and_unload) "
            "or take them off first"
        )
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds something already: give a folder of its own to a draft model")
    with staged_folder(folder) as staging:
        if draft.tokenizer is not None:
            draft.tokenizer.save_pretrained(staging)
        if draft.origin is None:
            draft.model.save_pretrained(staging)
        else:
            (staging / ORIGIN).write_text(json.dumps(asdict(draft.origin)), encoding="utf-8")
        if draft.prompt_tokens is not None:
            draft.prompt_tokens.save_pretrained(staging / PROMPTS)


def draft_folder(source: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """The folder itself or the downloaded one. Raises `FileNotFoundError` when it holds no model in safetensors."""
    return _with_weights(folder_of(source, PATTERNS, "a model in safetensors", revision, token))


def _with_weights(folder: Path) -> Path:
    if not any((folder / name).is_file() for name in WEIGHTS):
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {pickles[0]} is a pickle and is not opened: save it as safetensors" if pickles else ""
        raise FileNotFoundError(f"{folder} has neither {' nor '.join(WEIGHTS)}{hint}")
    return folder


def _origin(folder: Path, source: str | Path) -> Origin | None:
    """Where the weights are that `folder` tells of, or that were fetched to it; None for those of a folder here."""
    path = folder / ORIGIN
    if not path.is_file():
        return None if Path(source).is_dir() else Origin(str(source), folder.name)  # a commit is a folder in the cache
    told = read_object(path)
    name, revision = told.get("source"), told.get("revision")
    if not isinstance(name, str) or Path(name).exists() or not COMMIT.fullmatch(str(revision)):
        raise ValueError(f"{path} names {name!r} at {revision!r}: expected a repository on the Hub and its commit")
    return Origin(name, str(revision))


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in `folder`, None when there is none that says which id is which token."""
    file = folder / VOCABULARY
    return _read(file, file.stat().st_mtime_ns) if file.is_file() else None


@lru_cache(maxsize=4)
def _read(file: Path, written: int) -> PreTrainedTokenizerBase:
    """Every composition asks for the base's, which takes long to read."""
    return PreTrainedTokenizerFast(tokenizer_file=str(file))
