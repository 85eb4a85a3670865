"""The model's own replies to prompts: what every drafter here is trained on.

Knows batched greedy generation and a cache on disk that can be resumed. Does not know what is trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from transformers import PreTrainedModel

from .identity import Identity
from .storage import write_text


@dataclass(frozen=True)
class Reply:
    """Token ids of a prompt and of what the model answered."""

    prompt: list[int]
    reply: list[int]

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.reply


def own_replies(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    folder: Path,
    *,
    max_new_tokens: int = 192,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[Reply]:
    """Greedy replies of `model` to `prompts` (token ids), in the order of `prompts`.

    Batches are written to `folder` one file each, under a key of model, dtype, prompts and length, so that
    an interrupted call goes on where it stopped. Prompts of like length share a batch.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    cache = folder / _key(model, prompts, max_new_tokens, batch_size)
    bar = progress or Progress(disable=True)
    replies: dict[int, Reply] = {}
    for number, batch in enumerate(bar.track(batches, description="own replies")):
        file = cache / f"{number:05}.json"
        if not file.exists():
            made = _generate(model, [list(prompts[i]) for i in batch], max_new_tokens)
            write_text(file, json.dumps(made))
        for i, reply in zip(batch, json.loads(file.read_text(encoding="utf-8")), strict=True):
            replies[i] = Reply(list(prompts[i]), reply)
    return [replies[i] for i in range(len(prompts))]


def _key(model: PreTrainedModel, prompts: Sequence[Sequence[int]], length: int, batch: int) -> str:
    identity = Identity.of(model)
    text = json.dumps([identity.fingerprint, str(model.dtype), length, batch, [list(ids) for ids in prompts]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@torch.no_grad()
def _generate(model: Any, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    out = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=_pad(model),
    )
    return [_until_eos(row, _eos(model)) for row in out[:, width:].tolist()]


def _eos(model: PreTrainedModel) -> list[int]:
    eos = model.generation_config.eos_token_id
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


def _pad(model: PreTrainedModel) -> int:
    pad = model.generation_config.pad_token_id
    return pad if pad is not None else next(iter(_eos(model)), 0)


def _until_eos(ids: list[int], eos: list[int]) -> list[int]:
    """Cut after the first end-of-sequence token, which belongs to the reply."""
    for at, token in enumerate(ids, 1):
        if token in eos:
            return ids[:at]
    return ids
