"""Where the training of an EAGLE head begins: recipe, sizes, draft vocabulary and first weights.

Knows the base's configuration and what its replies say. Does not know the loss or the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ppd_compose.replies import Reply
from ppd_compose.states import ReplyStates
from ppd_compose.training_loop import Recipe

from .config import EagleConfig, default_layers
from .head import Head
from .network import DraftNetwork

SEEN = 8  # replies whose hidden states set the scale that training begins at
VARIANTS = ("1", "3", "3.1")
PASSED = 0.3  # root mean square of the features that training begins with


@dataclass(frozen=True)
class EagleRecipe(Recipe):
    """What decides the trained head."""

    points: int = 128
    learning_rate: float = 1e-3
    unrolled: int = 4  # draft steps in a row that are trained
    vocabulary: int = 8192  # tokens that can be drafted, the most frequent ones of the replies
    # "3.1" normalises each hidden state before `fc` and feeds back the normalised output; "1" is the layer of EAGLE-1/2
    variant: str = "3"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            raise ValueError(f"variant {self.variant!r} is unknown: take one of {', '.join(VARIANTS)}")


def initial_head(base: PreTrainedModel, replies: Sequence[Reply], recipe: EagleRecipe) -> Head:
    """A head that passes on the latest of its hidden states, small; one with a norm at its end has the output scale of
    the base there. All else is random.

    So the first guesses come from features in the base's own space, which the layer's output soon outweighs. Decided by
    the seed and `replies` alone.
    """
    config = config_for(base, recipe)
    ids = draft_vocabulary(replies, config.draft_vocab_size, config.vocab_size)
    passed, last = _seen(base, replies[:SEEN], recipe, config)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(recipe.seed)
        network = DraftNetwork(config)
        size = torch.tensor(1.0)
        if config.version == 3:
            network.norm.weight.copy_(last.pow(2).mean(0).sqrt())
            network.fc.weight.zero_()
        if config.version == 3 and not config.fc_norm:
            # The median, since the first token of a text often has a state many times as large as all others.
            size = passed.pow(2).mean(-1).sqrt().median()
        network.fc.weight[:, -config.hidden_size :] = torch.eye(config.hidden_size) * PASSED / size
    return Head(config, {name: weight.detach() for name, weight in network.state_dict().items()}, target_ids=ids)


def config_for(base: PreTrainedModel, recipe: EagleRecipe) -> EagleConfig:
    """A draft layer of the sizes of the base's own layers."""
    config: Any = base.config.get_text_config()
    hidden, vocab, heads = config.hidden_size, config.vocab_size, config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    layer = {
        "hidden_size": hidden,
        "intermediate_size": getattr(config, "intermediate_size", None) or 4 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or hidden // heads,
        "rms_norm_eps": getattr(config, "rms_norm_eps", None) or 1e-6,
        "max_position_embeddings": getattr(config, "max_position_embeddings", None) or 2048,
        "rope_theta": rope.get("rope_theta") or 10_000.0,
    }
    drafted = min(recipe.vocabulary, vocab)
    if recipe.variant == "1":
        return EagleConfig(1, layer, vocab, drafted, hidden, 1)
    normed, layers = recipe.variant == "3.1", default_layers(config.num_hidden_layers)
    return EagleConfig(3, layer, vocab, drafted, hidden, len(layers), layers, fc_norm=normed, norm_output=normed)


def draft_vocabulary(replies: Sequence[Reply], size: int, vocab_size: int) -> Tensor | None:
    """The `size` most frequent tokens of the replies, ascending int64 `[size]`; of equals the lower. None for all."""
    if size >= vocab_size:
        return None
    said = torch.tensor([token for reply in replies for token in reply.reply])
    counts = torch.bincount(said, minlength=vocab_size)
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def _seen(
    base: PreTrainedModel, replies: Sequence[Reply], recipe: EagleRecipe, config: EagleConfig
) -> tuple[Tensor, Tensor]:
    """The latest hidden state that the head reads, and the base's normalised last one, `[tokens, hidden]` float32."""
    depth = base.config.get_text_config().num_hidden_layers
    latest = config.reads(depth)[-1]
    states = ReplyStates(base, sorted({latest, depth}), recipe.max_length, kept_bytes=0)
    told = [states(reply) for reply in replies]
    rows = (torch.cat([state[layer].float().cpu() for state in told]) for layer in (latest, depth))
    return next(rows), next(rows)


def checked(start: Head, recipe: EagleRecipe) -> Head:
    """`start`, where training can go on from it."""
    config = start.config
    variant = "1" if config.version == 1 else "3.1" if config.norm_output else "3"
    wanted = (min(recipe.vocabulary, config.vocab_size), variant)
    if (config.draft_vocab_size, recipe.variant) != wanted:
        raise ValueError(
            f"training was to start from a head of {config.draft_vocab_size} draft tokens and variant {wanted[1]}, the "
            f"recipe wants {wanted[0]} and {recipe.variant}: give the recipe those of the head"
        )
    return start
