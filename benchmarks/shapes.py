"""Bases of any size without their weights: Llama's shapes with random numbers, for what depends on size alone.

Knows names and sizes. What such a model writes means nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from ppd_compose.loading import DTYPES, load_base

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512,
    },
    "135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip

TIED = ("135m", "1b")  # whose embedding is the output head too


def base_of(name: str, dtype: str, device: str) -> tuple[Any, str]:
    """The model and its name: of random weights for a key of `SHAPES`, else loaded from a folder, the Hub or "demo"."""
    if name not in SHAPES:
        loaded = load_base(name, dtype, device)
        return loaded.model, loaded.name
    config = LlamaConfig(**SHAPES[name], max_position_embeddings=8192, tie_word_embeddings=name in TIED)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], attn_implementation="sdpa")
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    return model.eval(), name
