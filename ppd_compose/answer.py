"""One answer, streamed to standard output: what `ppd-compose generate` does.

Knows streamers. Does not know options.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import TextStreamer

from .compose import compose
from .loading import LoadedBase
from .prompts import encode
from .stats import Stats


def answer(
    loaded: LoadedBase, drafters: Sequence[Any], prompt: str, max_new_tokens: int, rows: int | None, seed: int,
    sampling: dict[str, Any],
) -> Stats:  # fmt: skip
    """Answer `prompt` as one user turn and return the statistics."""
    model = compose(loaded.model, *drafters, budget=rows)
    ids = torch.tensor([encode(loaded.tokenizer, prompt)], device=model.device)
    streamer = TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    torch.manual_seed(seed)
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, streamer=streamer, **sampling
    )
    stats: Stats = model.stats
    return stats
