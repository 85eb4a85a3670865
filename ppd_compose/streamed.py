"""One answer, streamed to standard output: what `ppd-compose generate` does.

Knows streamers. Does not know options.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from .prompts import encode
from .stats import Stats


def stream_answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    seed: int,
    sampling: dict[str, Any],
) -> Stats:
    """Let the composed `model` answer `prompt` as one user turn, and return the statistics."""
    ids = torch.tensor([encode(tokenizer, prompt)], device=model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    torch.manual_seed(seed)
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, streamer=streamer, **sampling
    )
    stats: Stats = model.stats
    return stats
