"""Training of heads that read prompt tokens: beside which ones, on which points, and how well they guess at the end.

Knows batches, blocks and the order of things. The loss is that of Medusa heads, the run itself the core's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppd_compose import PromptTokens
from ppd_compose.checkpoints import discard
from ppd_compose.distill import Batch as Inserted
from ppd_compose.distill import last_states
from ppd_compose.finish import OutputHead
from ppd_compose.identity import Identity
from ppd_compose.prompts import Prompt
from ppd_compose.replies import Reply
from ppd_compose.states import KeptStates
from ppd_compose.training_loop import Taught, frozen, points_of, replies_of_batch, run, usable, within_window
from ppd_compose.training_setup import checkpoints_in, split_replies, training_facts

from .card import model_card
from .drafter import MedusaHeads
from .loss import Batch, Blocks
from .prompt_heads import PromptHeads, reread
from .train import Batches, Drawn, HeadsRecipe, HeldOut, evaluate


@dataclass(frozen=True)
class PromptHeadsRecipe(HeadsRecipe):
    """What decides trained prompt heads, of which there are as many as prompt tokens. `width`: of the layer between."""

    batch_size: int = 4
    points: int = 128
    learning_rate: float = 2e-3
    width: int = 192


def train_medusa_prompt_heads(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    out: Path,
    medusa: MedusaHeads,
    prompt: PromptTokens,
    recipe: PromptHeadsRecipe,
    *,
    base_name: str | None = None,
    held_out: int = 64,
    reply_tokens: int = 160,
    reply_batch: int = 32,
    command: str = "",
    data: str = "",
) -> MedusaHeads:
    """Train heads that read the tokens of `prompt`, and save them with those of `medusa` to `out`, in bfloat16.

    Both must be of `base`, which is saved as theirs where `medusa` tells no identity. Replies and checkpoints are kept
    as `train_medusa` keeps them.
    Raises `ValueError` for what cannot be trained on or written to, and when training diverged.
    """
    begin, checkpoints = time.monotonic(), checkpoints_in(out, MedusaHeads)
    medusa.prepare(base)
    prompt.prepare(base)
    tokens = medusa.heads.token_map
    recipe = replace(recipe, heads=len(prompt.embeddings))
    replies, held = split_replies(base, tokenizer, prompts, held_out, reply_tokens, reply_batch)
    heads, told = train_prompt_heads(base, replies, held, prompt, tokens, recipe, checkpoints)
    facts = training_facts(base, asdict(recipe), replies, held, time.monotonic() - begin, command, data)
    like = torch.empty(0, dtype=torch.bfloat16, device="cpu")
    heads = replace(heads.to(like), facts={"accuracy": told.accuracy, "training": facts})
    made = MedusaHeads(
        medusa.heads, accuracy=_plain(medusa.accuracy), calibration=_plain(medusa.calibration),
        identity=_identity(medusa, base, base_name), training=medusa.training, prompt_heads=heads,
    )  # fmt: skip
    made.save_pretrained(out, card=model_card(made))
    discard(checkpoints)
    return made


def _identity(medusa: MedusaHeads, base: PreTrainedModel, name: str | None) -> Identity:
    """The base that `medusa` belongs to, else `base`, which has been found to fit; published heads tell at most what
    theirs is called."""
    own = Identity.of(base)
    return medusa.identity or replace(own, name=name or own.name or medusa.base_name)


def _plain(table: Any) -> Any:
    return None if table is None else table.tolist()


def train_prompt_heads(
    base: PreTrainedModel,
    replies: Sequence[Reply],
    held_out: Sequence[Reply],
    prompt: PromptTokens,
    tokens: Tensor | None,
    recipe: PromptHeadsRecipe,
    checkpoints: Path,
) -> tuple[PromptHeads, HeldOut]:
    """Prompt heads in float32 that use the base's output head, of it the rows of `tokens` `[entries]` int64 or all, and
    what held-out replies tell of them. The base is frozen for the duration and left as it was."""
    recipe = within_window(recipe, base, recipe.heads)
    mine = usable(replies, recipe, recipe.heads)
    with frozen(base):
        output = OutputHead.of(base, tokens)
        batches = PromptBatches(base, recipe, tokens, prompt)

        def step(blocks: PromptBlocks, number: int) -> Taught:
            taught: Taught = blocks(
                batches(replies_of_batch(mine, recipe, number), number), output, recipe.decay, recipe.kl
            )
            return taught

        blocks = PromptBlocks(recipe, output.weight.shape[1]).to(base.device)
        blocks = run(blocks, recipe, checkpoints, mine, step, {"prompt_tokens": prompt.digest})
        heads = PromptHeads(blocks.down.detach().cpu(), blocks.up.detach().cpu(), prompt.digest)
        return heads, evaluate(blocks, output, batches, held_out)


@dataclass(frozen=True)
class PromptBatch(Batch):
    """The same, and what is known at the points."""

    prompts: Tensor  # [distances, points, hidden], last states of the prompt tokens below
    roots: Tensor  # [points, hidden], embeddings of the tokens that follow


class PromptBatches(Batches):
    """Batches with the states of prompt tokens inserted at their points. Those at all points of a reply are asked for
    with the reply's own, so that every epoch draws from them."""

    def __init__(
        self, base: PreTrainedModel, recipe: PromptHeadsRecipe, tokens: Tensor | None, prompt: PromptTokens
    ) -> None:
        super().__init__(base, recipe, tokens)
        self.base, self.prompt = base, prompt
        self.states = KeptStates(base, self._ask)

    @torch.no_grad()
    def made(self, drawn: Sequence[Drawn]) -> PromptBatch:
        batch, prompts, roots = super().made(drawn), [], []
        for each in drawn:
            first = points_of(each.reply, self.recipe, self.recipe.heads).start
            prompts.append(each.states["prompts"][:, (each.points - first).to(self.device)])
            roots.append(self.base.get_input_embeddings()(each.ids[each.points + 1].to(self.device)))
        return PromptBatch(batch.states, batch.points, batch.truth, torch.cat(prompts, 1), torch.cat(roots))

    def _ask(self, reply: Reply) -> dict[int | str, Tensor]:
        ids = torch.tensor([reply.ids[: self.recipe.max_length]], device="cpu")
        points = torch.tensor([points_of(reply, self.recipe, self.recipe.heads)], device="cpu")
        inserted = Inserted(ids, points).to(self.device)
        context, prompts = last_states(self.base, self.prompt.embeddings, self.prompt.keys_values, inserted)
        return {self.layer: context[0], "prompts": prompts[0].transpose(0, 1)}


class PromptBlocks(Blocks):
    """Prompt heads in training: float32 parameters, products in the base's dtype. They begin as what the prompt tokens
    say themselves."""

    def __init__(self, recipe: PromptHeadsRecipe, hidden: int) -> None:
        nn.Module.__init__(self)
        dice = torch.Generator("cpu").manual_seed(recipe.seed)
        down = torch.randn(recipe.heads, 3 * hidden, recipe.width, generator=dice, device="cpu")
        self.down = nn.Parameter(down / math.sqrt(3 * hidden))
        self.up = nn.Parameter(torch.zeros(recipe.heads, recipe.width, hidden))

    def logits(self, batch: Batch, output: OutputHead) -> Tensor:
        """What the heads say `[distances, points, entries]` float32."""
        assert isinstance(batch, PromptBatch)
        last, dtype = batch.states[batch.points], batch.states.dtype
        states = reread(self.down.to(dtype), self.up.to(dtype), batch.prompts, last, batch.roots)
        return output(states)
