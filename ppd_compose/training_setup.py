"""Around every training: where it may write, which replies it learns from, and what is told of it.

Knows bases, prompts and folders. Does not know what is trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .drafters import CONFIGS
from .identity import device_name
from .prompts import Prompt, encode
from .replies import Reply, own_replies
from .sources import read_object
from .storage import cache_folder, refuse_unwritable

ADAPTER, CONFIG = CONFIGS
MARK = "ppd_compose"  # what our configurations hold


def checkpoints_in(out: Path, kind: Any, mark: str = MARK) -> Path:
    """The folder for the checkpoints of a training that writes to `out`, hidden so that nobody uploads it. Raises as
    `refuse_out`."""
    refuse_out(out, kind, mark)
    return out / ".checkpoints"


def refuse_out(out: Path, kind: Any, mark: str = MARK) -> None:
    """Raise `ValueError` when `out` cannot be written, or holds a model whose configuration has no entry `mark`, or an
    adapter or drafter that is not of `kind`, the class of what is written: they would be written over, or read in its
    place."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give the folder to write")
    refuse_unwritable(out)
    held = {name: read_object(out / name) for name in CONFIGS if (out / name).is_file()}
    if "model_type" in (told := held.get(CONFIG, {})) and mark not in told:
        raise ValueError(
            f"{out} holds a model ({told['model_type']}), which would be written over: give another folder"
        )
    if ADAPTER in held and (peft := held[ADAPTER].get("peft_type")) != "PPD":
        raise ValueError(
            f"{out} holds an adapter of another kind ({peft or 'no peft_type'}), which would be written over: give "
            "another folder"
        )
    config = next(iter(held), None)
    if config is not None and not kind.recognises(held[config], {path.name for path in out.iterdir()}):
        raise ValueError(
            f"{out} holds another kind of drafter, by its {config}, which would be written over or read in place of "
            "the new one: give another folder"
        )


def split_replies(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    held_out: int,
    reply_tokens: int,
    reply_batch: int,
) -> tuple[list[Reply], list[Reply]]:
    """The base's own replies to train on, and those of the last `held_out` prompts (at most a tenth); a prompt that is
    given twice counts once.

    Prompts that leave no room for a reply are left out, with a warning. Raises `ValueError` when none is left.
    """
    ids = list(dict.fromkeys(tuple(encode(tokenizer, prompt.turns[0])) for prompt in prompts))
    ids = _with_room(ids, getattr(base.config.get_text_config(), "max_position_embeddings", None), reply_tokens)
    with Progress() as progress:
        replies = own_replies(
            base, ids, cache_folder() / "replies",
            max_new_tokens=reply_tokens, batch_size=reply_batch, progress=progress,
        )  # fmt: skip
    kept = len(replies) - min(held_out, max(1, len(replies) // 10))
    return replies[:kept], replies[kept:]


def _with_room(prompts: list[tuple[int, ...]], positions: int | None, reply_tokens: int) -> list[tuple[int, ...]]:
    if positions is None:
        return prompts
    short = [ids for ids in prompts if len(ids) + reply_tokens <= positions]
    message = (
        f"with replies of {reply_tokens} tokens {len(prompts) - len(short)} of {len(prompts)} prompts exceed the "
        f"{positions} positions of the base"
    )
    if not short:
        raise ValueError(f"{message}: shorten them, or lower reply_tokens")
    if len(short) < len(prompts):
        warnings.warn(f"{message}: left out", stacklevel=3)
    return short


def training_facts(
    base: PreTrainedModel,
    recipe: Mapping[str, Any],
    replies: Sequence[Reply],
    held_out: Sequence[Reply],
    seconds: float,
    command: str,
    data: str,
) -> dict[str, Any]:
    """How something was trained, as plain data for its files and its card."""
    return {
        **recipe,
        "command": command,
        "data": data,
        "prompts": len(replies),
        "held_out": len(held_out),
        "reply_tokens": sum(len(reply.reply) for reply in [*replies, *held_out]),
        "seconds": round(seconds),
        "hardware": _hardware(base),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _hardware(base: PreTrainedModel) -> str:
    threads = f", {torch.get_num_threads()} threads" if base.device.type == "cpu" else ""
    return f"{device_name(base)}{threads}, {str(base.dtype).removeprefix('torch.')}"
