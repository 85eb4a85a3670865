"""From a base and prompts to Medusa heads: the whole of `ppd-compose train medusa`.

Knows which replies, points and tokens are used, in which order. The loss is `loss`, the run itself the core's.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppd_compose.checkpoints import discard
from ppd_compose.finish import OutputHead, refuse_other_logits
from ppd_compose.identity import Identity
from ppd_compose.prompts import Prompt
from ppd_compose.replies import Reply
from ppd_compose.states import KeptStates, ReplyStates
from ppd_compose.top import best_tokens
from ppd_compose.training_loop import (
    Recipe,
    Taught,
    dice_of,
    draw_points,
    frozen,
    points_of,
    replies_of_batch,
    run,
    usable,
)
from ppd_compose.training_setup import checkpoints_in, split_replies, training_facts

from .card import model_card
from .claims import fitted
from .drafter import WIDTH, MedusaHeads
from .heads import Heads
from .loss import OUTSIDE, Batch, Blocks


@dataclass(frozen=True)
class HeadsRecipe(Recipe):
    """What decides trained heads of any kind. `kl`: share of the base's own distribution in the loss, 0 to 1."""

    heads: int = 4
    kl: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.kl <= 1:
            raise ValueError(f"kl is a share from 0 to 1, got {self.kl}")


@dataclass(frozen=True)
class MedusaRecipe(HeadsRecipe):
    """The same of Medusa heads. `vocabulary`: how many of the most frequent tokens of the replies they choose from,
    None for all."""

    batch_size: int = 4
    points: int = 128
    learning_rate: float = 3e-3
    layers: int = 1
    vocabulary: int | None = 8192


@dataclass(frozen=True)
class HeldOut:
    """What held-out replies tell of heads."""

    accuracy: list[list[float]]  # [head][10], how often the token at that distance was the guess of that rank
    calibration: list[list[float]] | None = None  # [head] offset and slope, see `claims.calibrated`


def train_medusa(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    out: Path,
    recipe: MedusaRecipe,
    *,
    base_name: str | None = None,
    held_out: int = 64,
    reply_tokens: int = 160,
    reply_batch: int = 32,
    command: str = "",
    data: str = "",
) -> MedusaHeads:
    """Train heads for `base` on its own replies to `prompts` and save them to `out`, in bfloat16.

    The last `held_out` prompts (at most a tenth) are kept for the accuracies. Replies are cached by base and prompts;
    checkpoints lie in `out` until the heads are written, so a killed call goes on where it stopped.
    Raises `ValueError` for what cannot be trained on or written to, and when training diverged.
    """
    begin, checkpoints = time.monotonic(), checkpoints_in(out, MedusaHeads)
    refuse_other_logits(base)
    replies, held = split_replies(base, tokenizer, prompts, held_out, reply_tokens, reply_batch)
    heads, told = train_heads(base, replies, held, recipe, checkpoints)
    identity = Identity.of(base, base_name)
    facts = training_facts(base, asdict(recipe), replies, held, time.monotonic() - begin, command, data)
    like = torch.empty(0, dtype=torch.bfloat16, device="cpu")
    made = MedusaHeads(
        heads.to(like), accuracy=told.accuracy, calibration=told.calibration, identity=identity, training=facts
    )
    made.save_pretrained(out, card=model_card(made))
    discard(checkpoints)
    return made


def train_heads(
    base: PreTrainedModel,
    replies: Sequence[Reply],
    held_out: Sequence[Reply],
    recipe: MedusaRecipe,
    checkpoints: Path,
) -> tuple[Heads, HeldOut]:
    """Heads in float32 that use the base's output head, and what held-out replies tell of them.

    The base is frozen for the duration and left as it was; of several processes each moves it to its device. The same
    recipe, replies and machine give the same heads, whether or not the run was interrupted.
    Raises `ValueError` when no reply is long enough, or training diverged.
    """
    mine = usable(replies, recipe, recipe.heads)
    tokens = None if recipe.vocabulary is None else frequent_tokens(mine, recipe.vocabulary)
    with frozen(base):
        output = OutputHead.of(base, tokens)
        batches = Batches(base, recipe, tokens)

        def step(blocks: Blocks, number: int) -> Taught:
            taught: Taught = blocks(
                batches(replies_of_batch(mine, recipe, number), number), output, recipe.decay, recipe.kl
            )
            return taught

        blocks = Blocks(recipe.heads, recipe.layers, output.weight.shape[1]).to(base.device)
        blocks = run(blocks, recipe, checkpoints, mine, step)
        heads = Heads(
            blocks.weight.detach().cpu(), blocks.bias.detach().cpu(), (), tokens, Identity.of(base).vocab_size
        )
        return heads, evaluate(blocks, output, batches, held_out)


def frequent_tokens(replies: Sequence[Reply], count: int) -> Tensor:
    """The `count` most frequent tokens of the replies, ascending `[entries]` int64; fewer where there are fewer."""
    seen = Counter(token for reply in replies for token in reply.reply)
    ranked = sorted(seen, key=lambda token: (-seen[token], token))
    return torch.tensor(sorted(ranked[:count]), dtype=torch.int64, device="cpu")


@dataclass(frozen=True)
class Drawn:
    """A reply in a batch."""

    reply: Reply
    ids: Tensor  # [length] int64, its tokens that are used, on the host
    points: Tensor  # [count] int64, the positions drawn in it, on the host
    states: Mapping[Any, Tensor]  # what the base says of it, on the base's device


class Batches:
    """Replies as batches for the loss: hidden states, points drawn from seed and number, and the truth at them."""

    def __init__(self, base: PreTrainedModel, recipe: HeadsRecipe, tokens: Tensor | None) -> None:
        self.recipe, self.device = recipe, base.device
        self.layer = base.config.get_text_config().num_hidden_layers
        self.states: KeptStates[Any] = ReplyStates(base, [self.layer], recipe.max_length)
        size = Identity.of(base).vocab_size
        self.entry = torch.arange(size, device="cpu")
        if tokens is not None:
            self.entry = torch.full((size,), OUTSIDE, device="cpu")
            self.entry[tokens] = torch.arange(len(tokens), device="cpu")

    def __call__(self, replies: Sequence[Reply], number: int) -> Batch:
        """The batch `number` of `replies`, on the base's device."""
        dice, drawn = dice_of(self.recipe, number), []
        for reply in replies:
            ids = torch.tensor(reply.ids[: self.recipe.max_length], device="cpu")
            points = draw_points(reply, self.recipe, self.recipe.heads, dice)
            drawn.append(Drawn(reply, ids, points, self.states(reply)))
        return self.made(drawn)

    def made(self, drawn: Sequence[Drawn]) -> Batch:
        """The batch of what was `drawn`."""
        ahead = torch.arange(1, self.recipe.heads + 1, device="cpu")[:, None]
        states, points, truth, offset = [], [], [], 0
        for each in drawn:
            states.append(each.states[self.layer])
            points.append(offset + each.points)
            truth.append(self.entry[each.ids[each.points + 1 + ahead]])
            offset += len(each.ids)
        return Batch(torch.cat(states), torch.cat(points).to(self.device), torch.cat(truth, 1).to(self.device))


@torch.no_grad()
def evaluate(blocks: Blocks, output: OutputHead, batches: Batches, replies: Sequence[Reply]) -> HeldOut:
    """How often and how surely the heads are right on `replies`; a token outside the vocabulary is a miss."""
    claims, hits = [], []
    for number, reply in enumerate(r for r in replies if points_of(r, batches.recipe, batches.recipe.heads)):
        batch = batches([reply], number)
        log_probs, top = best_tokens(blocks.logits(batch, output).flatten(0, 1), WIDTH)
        shape = (*batch.truth.shape, -1)
        claims.append(log_probs.view(shape).cpu())
        hits.append((top.view(shape) == batch.truth[..., None]).cpu())
    if not hits:
        return HeldOut([[0.0] * WIDTH] * batches.recipe.heads)
    return figures_of(torch.cat(claims, 1), torch.cat(hits, 1))


def figures_of(claims: Tensor, hits: Tensor) -> HeldOut:
    """What `claims` `[heads, points, ranks]` and which of them came true tell. A head is asked about what follows
    guesses that were right, so it is calibrated where all heads before it had the token among their guesses."""
    shares = nn.functional.pad(hits.double().mean(1), (0, WIDTH - hits.shape[-1]))
    reached = torch.cat([torch.ones_like(hits[:1, :, 0]), hits.any(-1).cumprod(0)[:-1].bool()])
    pairs = [fitted(claims[k][reached[k]], hits[k][reached[k]]) for k in range(len(hits))]
    return HeldOut(shares.tolist(), pairs)
