"""From a base and a prompt file to an adapter folder: the whole of `ppd-compose train ppd`.

Knows the order: prompts, own replies, training, files. Each part is a module of its own.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .identity import Identity, device_name
from .prompt import PromptTokens
from .prompts import Prompt, encode
from .replies import Reply, own_replies
from .storage import cache_folder
from .train import PromptRecipe, train_prompt_tokens


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
    checkpoints lie in `out/checkpoints` until the adapter is written, so a killed call goes on where it stopped.
    Training goes on from `start` where prompt tokens are given.
    """
    if start is not None:
        start.prepare(base)
    begin = time.monotonic()
    replies, held = split_replies(base, tokenizer, prompts, held_out, reply_tokens, reply_batch)
    trained = train_prompt_tokens(
        base, replies, held, recipe, out / "checkpoints", None if start is None else start.embeddings
    )
    identity = Identity.of(base)
    identity = replace(identity, name=base_name or identity.name)
    facts = training_facts(base, asdict(recipe), replies, held, time.monotonic() - begin, command, data)
    prompt = PromptTokens(trained.embeddings, trained.accuracy, identity, facts)
    prompt.save_pretrained(out)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)  # of several processes one is first
    return prompt


def split_replies(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    held_out: int,
    reply_tokens: int,
    reply_batch: int,
) -> tuple[list[Reply], list[Reply]]:
    """The base's own replies to train on, and those of the last `held_out` prompts (at most a tenth); a prompt that is
    given twice counts once."""
    ids = list(dict.fromkeys(tuple(encode(tokenizer, prompt.turns[0])) for prompt in prompts))
    with Progress() as progress:
        replies = own_replies(
            base, ids, cache_folder() / "replies",
            max_new_tokens=reply_tokens, batch_size=reply_batch, progress=progress,
        )  # fmt: skip
    kept = len(replies) - min(held_out, max(1, len(replies) // 10))
    return replies[:kept], replies[kept:]


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
