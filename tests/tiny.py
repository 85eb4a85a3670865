"""Small random models of many families, and drafters whose guesses are known: what the tests decode with."""

from __future__ import annotations

import numpy as np
import torch
import transformers

from ppd_compose import PromptTokens, TokenTree, hookimpl
from ppd_compose.cache import GENERATE_NAME

VOCAB = 61
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 160, "initializer_range": 0.4,
}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 2}
GPT2 = {"vocab_size": VOCAB, "n_positions": 160, "n_embd": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.4}
OPT = {
    "vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 160, "word_embed_proj_dim": 32, "init_std": 0.4,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES = {
    "llama": ("Llama", GROUPED),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 16}),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2", {**GROUPED, "head_dim": 8, "sliding_window": 16, "layer_types": MIXED}),
    "gemma3": ("Gemma3", {**GROUPED, "head_dim": 8, "sliding_window": 16, "layer_types": MIXED}),
    "phi3": ("Phi3", {**GROUPED, "pad_token_id": 0}),
    "gpt2": ("GPT2", GPT2),
    "gpt_neox": ("GPTNeoX", COMMON),
    "opt": ("OPT", OPT),
    "mixtral": (
        "Mixtral",
        {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"},
    ),
    "olmo2": ("Olmo2", GROUPED),
    "granite": ("Granite", {**GROUPED, "logits_scaling": 4.0}),
    "smollm3": ("SmolLM3", {**GROUPED, "pad_token_id": 0, "no_rope_layers": [1, 0, 1]}),
}
CLASSES = {"GPT2": "GPT2LMHeadModel"}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}


def tiny(family: str = "llama", *, seed: int = 0, dtype=torch.float64, attention: str = "sdpa", eos=None, **more):
    """A random model of `family`; with `initializer_range` 0.4 its continuations vary."""
    name, settings = FAMILIES[family]
    config = getattr(transformers, CONFIGS.get(name, f"{name}Config"))(
        **{**settings, **more}, attn_implementation=attention
    )
    torch.manual_seed(seed)
    model = getattr(transformers, CLASSES.get(name, f"{name}ForCausalLM"))(config).eval().to(dtype)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0, eos_token_id=eos, bos_token_id=1)
    return model


def continuing(turn) -> dict:
    """Arguments of `generate` with which a chat goes on where `turn` ended."""
    return {GENERATE_NAME: turn[GENERATE_NAME]}


def prompt(length: int = 12, seed: int = 0) -> torch.Tensor:
    dice = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (1, length), generator=dice)


def prompt_tokens(n: int = 3, v: int = 1, hidden: int = 32, seed: int = 0) -> PromptTokens:
    dice = torch.Generator().manual_seed(seed)
    accuracy = [[0.5 / (rank + 1) for rank in range(4)]] * n
    return PromptTokens(torch.randn(n, v, hidden, generator=dice), accuracy)


class Oracle:
    """Drafter that knows the answer: chains of `depth` right tokens, each with wrong siblings, and every `lie`-th
    chain wrong from its second token on."""

    name = "oracle"

    def __init__(self, answer: list[int], depth: int = 4, lie: int = 3) -> None:
        self.answer, self.depth, self.lie = answer, depth, lie

    @hookimpl
    def propose(self, step) -> TokenTree | None:
        ahead = self.answer[len(step.ids) : len(step.ids) + self.depth]
        if not ahead:
            return None
        if step.index % self.lie == self.lie - 1:
            ahead = ahead[:1] + [(token + 1) % VOCAB for token in ahead[1:]]
        tokens, parents, claims = [step.ids[-1]], [-1], [0.0]
        parent = 0
        for depth, token in enumerate(ahead, 1):
            tokens += [(token + 7) % VOCAB, token]
            parents += [parent, parent]
            claims += [-0.3 * depth - 1.0, -0.3 * depth]
            parent = len(tokens) - 1
        return TokenTree.of(tokens, parents, claims)


class Returns:
    """Drafter that proposes whatever it was given."""

    def __init__(self, tree, name: str = "returns") -> None:
        self.tree, self.name = tree, name

    @hookimpl
    def propose(self, step):
        return self.tree(step) if callable(self.tree) else self.tree


def array(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)
