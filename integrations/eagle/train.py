"""Training of EAGLE-3 heads on a base's own replies: `train_eagle`, which `ppd-compose train eagle` calls.

Knows where a head starts, its draft vocabulary, what a batch is and how good the head is at the end. The loss is
`unroll`, the run itself `ppd_compose.loop`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppd_compose.identity import Identity
from ppd_compose.loop import Recipe, Taught, dice_of, draw_points, frozen, points_of, replies_of_batch, run, usable
from ppd_compose.prompts import Prompt
from ppd_compose.replies import Reply
from ppd_compose.states import ReplyStates
from ppd_compose.train_job import split_replies, training_facts

from .borrowed import OutputHead, borrow
from .card import head_card
from .config import EagleConfig, default_layers
from .drafter import EagleHead
from .head import Head, write_head
from .network import DraftNetwork
from .unroll import Lesson, Student

HALVES = (torch.bfloat16, torch.float16)
SEEN = 8  # replies whose hidden states set the scale that training begins at
PASSED = 0.3  # root mean square of the features that training begins with


@dataclass(frozen=True)
class EagleRecipe(Recipe):
    """What decides the trained head."""

    points: int = 128
    learning_rate: float = 1e-3
    unrolled: int = 4  # draft steps in a row that are trained
    vocabulary: int = 8192  # tokens that can be drafted, the most frequent ones of the replies
    variant: str = "3"  # "3.1" normalises each hidden state before `fc` and feeds back the normalised output

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("3", "3.1"):
            raise ValueError(f'variant {self.variant!r} is unknown: take "3" for EAGLE-3 or "3.1"')


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
    """Train an EAGLE-3 head for `base` on its own replies to `prompts` and save it to `out`.

    The last `held_out` prompts (at most a tenth) are kept for the accuracies. Replies are cached by base and prompt;
    checkpoints lie in `out/checkpoints` until the head is written, so a killed call goes on where it stopped.
    Training goes on from `start` where a head is given.
    """
    if start is not None:
        start.prepare(base)
    begin = time.monotonic()
    replies, held = split_replies(base, tokenizer, prompts, held_out, reply_tokens, reply_batch)
    head = train_head(base, replies, held, recipe, out / "checkpoints", None if start is None else start.head)
    identity = Identity.of(base)
    facts = training_facts(base, recipe, replies, held, time.monotonic() - begin, command, data)
    head = replace(head, identity=replace(identity, name=base_name or identity.name), training=facts)
    write_head(head, out, card=head_card(head))
    shutil.rmtree(out / "checkpoints")
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

    The base is moved to the device of the training, frozen for the duration and otherwise left as it was. The same
    recipe, replies and machine give the same weights, whether or not the run was interrupted. They come in the base's
    dtype where that is one of 16 bits, else in float32.

    Raises:
        ValueError: no reply is long enough, or `start` is no head that `recipe` could have made.
    """
    mine = usable(replies, recipe, recipe.unrolled)
    with frozen(base):
        head = initial_head(base, mine, recipe) if start is None else _checked(start, recipe)
        course = Course(head, base, recipe)
        network = DraftNetwork.of(head.config, {name: w.float().clone() for name, w in head.network.items()})
        student = course.student(network)

        def step(module: Student, number: int) -> Taught:
            dice = dice_of(recipe, number)
            lessons = [course.lesson(reply, dice) for reply in replies_of_batch(mine, recipe, number)]
            with course.precision():
                taught: Taught = module(lessons, recipe.unrolled, recipe.decay)
            return taught

        student = run(student, recipe, checkpoints, step)
        accuracy = evaluate(student, course, held_out)
    dtype = base.dtype if base.dtype in HALVES else torch.float32
    trained = {name: weight.detach().cpu().to(dtype) for name, weight in student.network.state_dict().items()}
    return replace(head, network=trained, accuracy=tuple(accuracy))


def initial_head(base: PreTrainedModel, replies: Sequence[Reply], recipe: EagleRecipe) -> Head:
    """A head that passes on the latest of its hidden states, small, and has the output scale of the base; else random.

    So the first guesses come from features in the base's own space, which the layer's output soon outweighs. Decided by
    the seed and `replies` alone.
    """
    config = config_for(base, recipe)
    ids = draft_vocabulary(replies, config.draft_vocab_size, config.vocab_size)
    passed, last = _seen(base, replies[:SEEN], recipe, config)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(recipe.seed)
        network = DraftNetwork(config)
        network.norm.weight.copy_(last.pow(2).mean(0).sqrt())
        # The median, since the first token of a text often has a state many times as large as all others.
        size = 1.0 if config.fc_norm else passed.pow(2).mean(-1).sqrt().median()
        network.fc.weight.zero_()
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
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": rope.get("rope_theta") or 10_000.0,
    }
    normed, layers = recipe.variant == "3.1", default_layers(config.num_hidden_layers)
    return EagleConfig(
        3, layer, vocab, min(recipe.vocabulary, vocab), hidden, len(layers), layers, fc_norm=normed, norm_output=normed
    )


def draft_vocabulary(replies: Sequence[Reply], size: int, vocab_size: int) -> Tensor | None:
    """The `size` most frequent tokens of the replies, ascending int64 `[size]`; of equals the lower. None for all."""
    if size >= vocab_size:
        return None
    said = torch.tensor([token for reply in replies for token in reply.reply])
    counts = torch.bincount(said, minlength=vocab_size)
    return counts.argsort(descending=True, stable=True)[:size].sort().values


@torch.no_grad()
def evaluate(student: Student, course: Course, replies: Sequence[Reply]) -> list[float]:
    """By depth, how often the first guess was right after a right prefix, at up to `recipe.points` of each reply."""
    steps = course.recipe.unrolled
    hits, seen = torch.zeros(steps, dtype=torch.float64), 0
    for number, reply in enumerate(r for r in replies if points_of(r, course.recipe, steps)):
        lesson = course.lesson(reply, dice_of(course.recipe, number))
        with course.precision():
            right = student([lesson], steps, 1.0).top1
        hits += right.double().cpu() * len(lesson.points)
        seen += len(lesson.points)
    return (hits / max(seen, 1)).tolist()


def _seen(
    base: PreTrainedModel, replies: Sequence[Reply], recipe: EagleRecipe, config: EagleConfig
) -> tuple[Tensor, Tensor]:
    """The latest hidden state that the head reads, and the base's normalised last one, `[tokens, hidden]` float32."""
    depth = base.config.get_text_config().num_hidden_layers
    latest = config.reads(depth)[-1]
    states = ReplyStates(base, [latest, depth], recipe.max_length, kept_bytes=0)
    told = [states(reply) for reply in replies]
    rows = (torch.cat([state[layer].float().cpu() for state in told]) for layer in (latest, depth))
    return next(rows), next(rows)


def _checked(start: Head, recipe: EagleRecipe) -> Head:
    """`start`, where training can go on from it."""
    config = start.config
    if config.version != 3:
        raise ValueError(
            "training was to start from an EAGLE-1 head, but it makes EAGLE-3 heads: start from one of these"
        )
    wanted = (min(recipe.vocabulary, config.vocab_size), "3.1" if config.norm_output else "3")
    if (config.draft_vocab_size, recipe.variant) != wanted:
        raise ValueError(
            f"training was to start from a head of {config.draft_vocab_size} draft tokens and variant {wanted[1]}, the "
            f"recipe wants {wanted[0]} and {recipe.variant}: give the recipe those of the head"
        )
    return start
