"""Training of EAGLE heads on a base's own replies: `train_eagle`, which `ppd-compose train eagle` calls.

Knows what a batch is and how good the head is at the end. Where a head starts is `initial`, the loss `unroll`, the run
itself `ppd_compose.training_loop`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppd_compose.checkpoints import discard
from ppd_compose.finish import OutputHead, refuse_other_logits
from ppd_compose.identity import Identity
from ppd_compose.prompts import Prompt
from ppd_compose.replies import Reply
from ppd_compose.states import ReplyStates
from ppd_compose.training_loop import Taught, dice_of, draw_points, frozen, points_of, replies_of_batch, run, usable
from ppd_compose.training_setup import checkpoints_in, split_replies, training_facts

from .borrowed import borrow
from .card import head_card
from .drafter import EagleHead
from .head import Head, refuse_index, write_head
from .initial import EagleRecipe, checked, initial_head
from .network import DraftNetwork
from .unroll import Lesson, Student

HALVES = (torch.bfloat16, torch.float16)


class Course:
    """Replies as lessons for one head on one base."""

    def __init__(self, head: Head, base: PreTrainedModel, recipe: EagleRecipe) -> None:
        self.base, self.recipe, self.parts = base, recipe, borrow(head, base)
        self.depth = base.config.get_text_config().num_hidden_layers
        self.layers = head.config.reads(self.depth)
        self.states = ReplyStates(base, sorted({*self.layers, self.depth}), recipe.max_length)
        count = head.config.vocab_size
        self.draft_ids = torch.full((count,), -1, device=self.parts.device)
        ids = torch.arange(count, device=self.parts.device) if self.parts.target_ids is None else self.parts.target_ids
        self.draft_ids[ids] = torch.arange(len(ids), device=ids.device)

    def lesson(self, reply: Reply, dice: torch.Generator) -> Lesson:
        """`reply` at up to `recipe.points` of its points."""
        states = {layer: self._wide(state) for layer, state in self.states(reply).items()}
        ids = torch.tensor(reply.ids[: self.recipe.max_length], device=self.parts.device)
        points = draw_points(reply, self.recipe, self.recipe.unrolled, dice).to(ids.device)
        with torch.no_grad():
            embeddings = self._wide(self.parts.embed(ids))
        read = [states[layer] for layer in self.layers]
        return Lesson(read, states[self.depth], embeddings, self.draft_ids[ids], points)

    def precision(self) -> AbstractContextManager[Any]:
        """Products in the base's dtype where that is one of 16 bits; parameters stay in float32."""
        device, dtype = self.parts.device.type, self.base.dtype
        return torch.autocast(device, dtype=dtype if dtype in HALVES else None, enabled=dtype in HALVES)

    def student(self, network: DraftNetwork) -> Student:
        """`network` as what is trained, with the output head that it drafts with and the base's own."""
        teacher = OutputHead.of(self.base, self.parts.target_ids)
        like = self._wide(self.parts.output.weight[:0])
        return Student(network, self.parts.output.to(like), teacher.to(like)).to(self.parts.device)

    def _wide(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype in HALVES else tensor.float()


def train_eagle(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    out: Path,
    recipe: EagleRecipe,
    *,
    base_name: str | None = None,
    held_out: int = 64,
    reply_tokens: int = 160,
    reply_batch: int = 32,
    command: str = "",
    data: str = "",
    start: EagleHead | None = None,
) -> EagleHead:
    """Train an EAGLE head for `base` on its own replies to `prompts` and save it to `out`.

    The last `held_out` prompts (at most a tenth) are kept for the accuracies. Replies are cached by base and prompt;
    checkpoints lie in `out` until the head is written, so a killed call goes on where it stopped.
    Training goes on from `start` where a head is given.
    Raises `ValueError` for what cannot be trained on or written to, and when training diverged.
    """
    if start is not None:
        start.prepare(base)
        checked(start.head, recipe)  # before replies are made
    begin, checkpoints = time.monotonic(), checkpoints_in(out, EagleHead)
    refuse_index(out)
    refuse_other_logits(base)
    replies, held = split_replies(base, tokenizer, prompts, held_out, reply_tokens, reply_batch)
    head = train_head(base, replies, held, recipe, checkpoints, None if start is None else start.head)
    facts = training_facts(base, asdict(recipe), replies, held, time.monotonic() - begin, command, data)
    head = replace(head, identity=Identity.of(base, base_name), training=facts)
    write_head(head, out, card=head_card(head))
    discard(checkpoints)
    return EagleHead(head)


def train_head(
    base: PreTrainedModel,
    replies: Sequence[Reply],
    held_out: Sequence[Reply],
    recipe: EagleRecipe,
    checkpoints: Path,
    start: Head | None = None,
) -> Head:
    """Distil `base` into a draft layer on its own `replies`, resuming from the newest of `checkpoints`.

    The base is frozen for the duration and left as it was; of several processes each moves it to its device. The same
    recipe, replies and machine give the same weights, whether or not the run was interrupted. They come in the base's
    dtype where that is one of 16 bits, else in float32.

    Raises:
        ValueError: no reply is long enough, or `start` is no head that `recipe` could have made.
    """
    mine = usable(replies, recipe, recipe.unrolled)
    with frozen(base):
        head = initial_head(base, mine, recipe) if start is None else checked(start, recipe)
        course = Course(head, base, recipe)
        network = DraftNetwork.of(head.config, {name: w.float().clone() for name, w in head.network.items()})
        student = course.student(network)

        def step(module: Student, number: int) -> Taught:
            dice = dice_of(recipe, number)
            lessons = [course.lesson(reply, dice) for reply in replies_of_batch(mine, recipe, number)]
            with course.precision():
                taught: Taught = module(lessons, recipe.unrolled, recipe.decay)
            return taught

        student = run(student, recipe, checkpoints, mine, step)
        accuracy = evaluate(student, course, held_out)
    dtype = base.dtype if base.dtype in HALVES else torch.float32
    trained = {name: weight.detach().cpu().to(dtype) for name, weight in student.network.state_dict().items()}
    return replace(head, network=trained, accuracy=tuple(accuracy))


@torch.no_grad()
def evaluate(student: Student, course: Course, replies: Sequence[Reply]) -> list[float]:
    """By depth, how often the first guess was right after a right prefix, at up to `recipe.points` of each reply."""
    steps = course.recipe.unrolled
    hits, seen = torch.zeros(steps, dtype=torch.float64, device="cpu"), 0
    for number, reply in enumerate(r for r in replies if points_of(r, course.recipe, steps)):
        lesson = course.lesson(reply, dice_of(course.recipe, number))
        with course.precision():
            right = student([lesson], steps, 1.0).top1
        hits += right.cpu() * len(lesson.points)
        seen += len(lesson.points)
    return (hits / max(seen, 1)).tolist()
