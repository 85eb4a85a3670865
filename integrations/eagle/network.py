"""The draft network: one decoder layer that continues the base's hidden states, in pure torch.

Knows the two ways to feed it, EAGLE-1/2's (arXiv 2401.15077, section 4.1) and EAGLE-3's (arXiv 2503.01840,
section 3.1). Does not know vocabularies, candidate trees or files.

Row p stands for the pair (hidden state of position p, embedding of the token at p + 1) and has the rotary position p.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from .config import EagleConfig


class Rope(NamedTuple):
    """Cosines and sines of some rows `[rows, head_dim]`."""

    cos: Tensor
    sin: Tensor

    def __call__(self, heads: Tensor) -> Tensor:
        """Turn `heads` `[heads, rows, head_dim]` to their positions."""
        low, high = heads.chunk(2, dim=-1)
        return heads * self.cos + torch.cat([-high, low], dim=-1) * self.sin


class Rows(NamedTuple):
    """What rows bring to the layer: the input of its attention, and what its output is added to `[rows, hidden]`."""

    attended: Tensor  # [rows, hidden], in version 3 [rows, 2 * hidden]
    residual: Tensor


class Drafted(NamedTuple):
    """What the layer made of rows `[rows, hidden]`."""

    feature: Tensor  # what stands in for the hidden state in the row after it
    hidden: Tensor  # what the output head takes


class DraftAttention(nn.Module):
    """Grouped-query attention of rows over keys and values that are kept outside."""

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        llama: Any = config.llama()
        self.dim, self.kv_heads = llama.head_dim, llama.num_key_value_heads
        wide = 2 * config.hidden_size if config.version == 3 else config.hidden_size
        qkv, heads = "qkv" in config.biases, llama.num_attention_heads
        self.q_proj = nn.Linear(wide, heads * self.dim, bias=qkv)
        self.k_proj = nn.Linear(wide, self.kv_heads * self.dim, bias=qkv)
        self.v_proj = nn.Linear(wide, self.kv_heads * self.dim, bias=qkv)
        self.o_proj = nn.Linear(heads * self.dim, config.hidden_size, bias="o" in config.biases)
        self.q_norm, self.k_norm = (
            LlamaRMSNorm(self.dim, eps=llama.rms_norm_eps) if config.qk_norm else nn.Identity() for _ in range(2)
        )

    def remember(self, attended: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Keys and values `[kv heads, rows, head_dim]`."""
        keys = self.k_norm(self.k_proj(attended).view(len(attended), -1, self.dim)).transpose(0, 1)
        values = self.v_proj(attended).view(len(attended), -1, self.dim).transpose(0, 1)
        return rope(keys), values

    def forward(self, attended: Tensor, rope: Rope, keys: Tensor, values: Tensor, see: Tensor | None) -> Tensor:
        """Rows `[rows, hidden]`, each over the columns that `see` bool `[rows, columns]` shows it; None: over all."""
        rows = len(attended)
        queries = rope(self.q_norm(self.q_proj(attended).view(rows, -1, self.dim)).transpose(0, 1))
        # The queries that share a key head stand below one another, so that no key is repeated.
        group = queries.shape[0] // self.kv_heads
        mask = None if see is None else see.repeat(group, 1)
        seen = nn.functional.scaled_dot_product_attention(
            queries.reshape(1, self.kv_heads, group * rows, self.dim), keys[None], values[None], attn_mask=mask
        )
        joined: Tensor = self.o_proj(seen.reshape(-1, rows, self.dim).transpose(0, 1).reshape(rows, -1))
        return joined


class DraftLayer(nn.Module):
    """One decoder layer; in version 1 without a norm before its attention, in version 3 with two."""

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        llama: Any = config.llama()
        self.self_attn, self.mlp = DraftAttention(config), LlamaMLP(llama)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=llama.rms_norm_eps)
        if config.version == 3:
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=llama.rms_norm_eps)
            self.hidden_norm = LlamaRMSNorm(config.hidden_size, eps=llama.rms_norm_eps)

    def forward(self, rows: Rows, rope: Rope, keys: Tensor, values: Tensor, see: Tensor | None) -> Tensor:
        """Rows `[rows, hidden]` after attention and feed-forward."""
        hidden = rows.residual + self.self_attn(rows.attended, rope, keys, values, see)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class DraftNetwork(nn.Module):
    """All that is trained of a head but its own embedding and output head, if it has them."""

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        self.config = config
        llama: Any = config.llama()
        hidden, eps, fused = config.hidden_size, llama.rms_norm_eps, config.states * config.state_size
        self.fc = nn.Linear(fused if config.version == 3 else 2 * hidden, hidden, bias="fc" in config.biases)
        self.layer = DraftLayer(config)
        if config.version == 3:
            self.norm = LlamaRMSNorm(hidden, eps=eps)
        if config.norm_before_fc:
            self.input_norm = LlamaRMSNorm(fused, eps=eps)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(LlamaRMSNorm(config.state_size, eps=eps) for _ in range(config.states))
        # Not a submodule: a change of dtype must not round its frequencies.
        self.positions = [_rotary(llama)]

    @classmethod
    def of(cls, config: EagleConfig, tensors: Mapping[str, Tensor]) -> DraftNetwork:
        """A network that holds `tensors` themselves, named as its state dict names them."""
        with torch.device("meta"):
            network = cls(config)
        network.load_state_dict(dict(tensors), assign=True)
        return network

    def rope(self, positions: Tensor, like: Tensor) -> Rope:
        """Rotary factors of `positions` int64 `[rows]`, in the dtype of `like`."""
        cos, sin = self.positions[0](like, positions[None])
        return Rope(cos[0], sin[0])

    def fuse(self, states: Sequence[Tensor]) -> Tensor:
        """What the layer takes for hidden states of the base, `[rows, state_size]` each: `[rows, hidden]`."""
        if self.config.version == 1:
            return states[0]
        if self.config.fc_norm:
            states = [norm(state) for norm, state in zip(self.fc_norm, states, strict=True)]
        fused = torch.cat(list(states), dim=-1)
        joined: Tensor = self.fc(self.input_norm(fused) if self.config.norm_before_fc else fused)
        return joined

    def rows(self, embeddings: Tensor, features: Tensor) -> Rows:
        """Rows of token embeddings and features `[rows, hidden]`."""
        if self.config.version == 1:
            joined = self.fc(torch.cat([embeddings, features], dim=-1))
            return Rows(joined, joined)
        normed = self.layer.hidden_norm(features)
        attended = torch.cat([self.layer.input_layernorm(embeddings), normed], dim=-1)
        return Rows(attended, normed if self.config.norm_before_residual else features)

    def remember(self, rows: Rows, rope: Rope) -> tuple[Tensor, Tensor]:
        """Keys and values of `rows` `[kv heads, rows, head_dim]`."""
        return self.layer.self_attn.remember(rows.attended, rope)

    def forward(self, rows: Rows, rope: Rope, keys: Tensor, values: Tensor, see: Tensor | None = None) -> Drafted:
        """Run `rows` over `keys` and `values`, their own among them; `see` bool `[rows, columns]`, None for all."""
        out: Tensor = self.layer(rows, rope, keys, values, see)
        if self.config.version == 1:
            return Drafted(out, out)
        normed: Tensor = self.norm(out)
        return Drafted(normed if self.config.norm_output else out, normed)


def _rotary(llama: Any) -> LlamaRotaryEmbedding:
    with torch.device("cpu"):  # also where the network itself has no memory yet
        return LlamaRotaryEmbedding(llama)
