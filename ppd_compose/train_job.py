"""From a base and a prompt file to an adapter folder: the whole of `ppd-compose train ppd`.

Knows the order: prompts, own replies, training, files. Each part is a module of its own.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .checkpoints import discard
from .drafters import CONFIGS
from .identity import Identity, device_name
from .prompt import PromptTokens
from .prompts import Prompt, encode
from .replies import Reply, own_replies
from .sources import read_object
from .storage import cache_folder, refuse_unwritable
from .train import PromptRecipe, first_rows, train_prompt_tokens

ADAPTER, CONFIG = CONFIGS
MARK = "ppd_compose"  # what our configurations hold


def train_ppd(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    out: Path,
    recipe: PromptRecipe,
    *,
    base_name: str | None = None,
    held_out: int = 64,
    reply_tokens: int = 160,
    reply_batch: int = 32,
    command: str = "",
    data: str = "",
    start: PromptTokens | None = None,
) -> PromptTokens:
    """Train prompt tokens for `base` on its own replies to `prompts` and save them to `out`.

    The last `held_out` prompts (at most a tenth) are kept for the accuracies. Replies are cached by base and prompt;
    checkpoints lie in `out` until the adapter is written, so a killed call goes on where it stopped.
    Training goes on from `start` where prompt tokens are given.
    Raises `ValueError` for what cannot be trained on or written to, and when training diverged.
    """
    checkpoints = checkpoints_in(out, PromptTokens)
    if start is not None:
        start.prepare(base)
    begun = () if start is None else (start.embeddings, start.keys_values)
    rows = first_rows(base, recipe, *begun)  # before replies are made: it may be refused
    begin = time.monotonic()
    replies, held = split_replies(base, tokenizer, prompts, held_out, reply_tokens, reply_batch)
    trained = train_prompt_tokens(base, replies, held, recipe, checkpoints, rows)
    identity = Identity.of(base)
    identity = replace(identity, name=base_name or identity.name)
    facts = training_facts(base, asdict(recipe), replies, held, time.monotonic() - begin, command, data)
    prompt = PromptTokens(trained.embeddings, trained.accuracy, identity, facts, trained.prefix)
    prompt.save_pretrained(out)
    discard(checkpoints)
    return prompt


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
    told = (
        f"with replies of {reply_tokens} tokens {len(prompts) - len(short)} of {len(prompts)} prompts exceed the "
        f"{positions} positions of the base"
    )
    if not short:
        raise ValueError(f"{told}: shorten them, or lower reply_tokens")
    if len(short) < len(prompts):
        warnings.warn(f"{told}: left out", stacklevel=3)
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
