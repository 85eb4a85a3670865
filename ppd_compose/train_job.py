"""From a base and a prompt file to an adapter folder: the whole of `ppd-compose train ppd`.

Knows the order: prompts, own replies, training, files. Each part is a module of its own.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .checkpoints import discard
from .identity import Identity
from .prompt import PromptTokens
from .prompts import Prompt
from .train import PromptRecipe, first_rows, train_prompt_tokens
from .training_setup import checkpoints_in, split_replies, training_facts


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
    identity = Identity.of(base, base_name)
    facts = training_facts(base, asdict(recipe), replies, held, time.monotonic() - begin, command, data)
    prompt = PromptTokens(trained.embeddings, trained.accuracy, identity, facts, trained.prefix)
    prompt.save_pretrained(out)
    discard(checkpoints)
    return prompt
