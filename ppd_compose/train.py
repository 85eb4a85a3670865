"""Training of prompt tokens: batches, optimiser, checkpoints and progress.

Knows accelerate and the order of the data. The loss is `distill`, the files of an adapter are `adapter`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from .distill import Batch, PromptRows
from .replies import Reply
from .storage import staged_folder

RANKS = 10


@dataclass(frozen=True)
class Recipe:
    """All that decides the trained rows, beside the base and the replies."""

    num_prompt_tokens: int = 3
    ensemble: int = 1
    steps: int = 1000
    batch_size: int = 1
    points: int = 48
    max_length: int = 512
    learning_rate: float = 1e-2
    warmup: int = 20
    decay: float = 0.8
    seed: int = 0
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name in ("num_prompt_tokens", "ensemble", "steps", "batch_size", "points", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Trained:
    """Trained rows `[n, v, hidden]` float32 and accuracies `[n][rank]`: how often the token at that distance
    was the guess of that rank, on held-out replies."""

    embeddings: Tensor
    accuracy: list[list[float]]


def train_prompt_tokens(
    base: PreTrainedModel,
    replies: Sequence[Reply],
    held_out: Sequence[Reply],
    recipe: Recipe,
    checkpoints: Path,
) -> Trained:
    """Distil `base` into prompt tokens on its own `replies`, resuming from the newest of `checkpoints`.

    The base is moved to the device of the training, frozen for the duration and otherwise left as it was. The same
    recipe, replies and machine give the same rows, whether or not the run was interrupted.
    Raises `ValueError` when no reply is long enough.
    """
    recipe = replace(recipe, max_length=min(recipe.max_length, _longest(base, recipe)))
    usable = [r for r in replies if _points(r, recipe)]
    if not usable:
        raise ValueError(f"none of {len(replies)} replies is longer than {recipe.num_prompt_tokens + 2} tokens")
    set_seed(recipe.seed)
    accelerator = Accelerator()
    base.to(accelerator.device)
    with _frozen(base):
        rows = _fit(accelerator, base, usable, recipe, checkpoints)
        return Trained(rows.embeddings.detach().cpu(), evaluate(base, rows, held_out, recipe))


def _longest(base: PreTrainedModel, recipe: Recipe) -> int:
    """Tokens of a sequence whose prompt tokens still see all of it: within the window, where the base has one."""
    config = base.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("sliding_window", "max_position_embeddings")]
    return min([limit - recipe.num_prompt_tokens for limit in limits if limit], default=recipe.max_length)


@contextmanager
def _frozen(base: PreTrainedModel) -> Iterator[None]:
    trainable = [p for p in base.parameters() if p.requires_grad]
    training = base.training
    base.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        base.train(training)
        for parameter in trainable:
            parameter.requires_grad_(True)


def _fit(
    accelerator: Accelerator, base: PreTrainedModel, replies: list[Reply], recipe: Recipe, folder: Path
) -> PromptRows:
    rows = PromptRows(initial_embeddings(base, recipe))
    optimizer = torch.optim.AdamW(rows.parameters(), lr=recipe.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup, recipe.steps)
    model, optimizer, schedule = accelerator.prepare(rows, optimizer, schedule)
    done = _resume(accelerator, folder, recipe)
    with _progress() as bar:
        task = bar.add_task("training", total=recipe.steps, completed=done)
        for step in range(done + 1, recipe.steps + 1):
            number = (step - 1) * accelerator.num_processes + accelerator.process_index
            taught = model(base, draw_batch(replies, recipe, number).to(accelerator.device), recipe.decay)
            accelerator.backward(taught.loss)
            accelerator.clip_grad_norm_(rows.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            hits = (taught.log_probs.argmax(-1) == taught.truth).float().mean(0)
            bar.update(task, advance=1, loss=taught.loss.item(), top1=_percent(hits.tolist()))
            if step % recipe.checkpoint_every == 0 or step == recipe.steps:
                bar.console.print(f"step {step}: loss {taught.loss.item():.3f}, top-1 {_percent(hits.tolist())}")
                _checkpoint(accelerator, folder, step, recipe)
    return rows


def initial_embeddings(base: Any, recipe: Recipe) -> Tensor:
    """Rows near the mean of the base's embeddings `[n, v, hidden]` float32, from the seed alone."""
    weight: Tensor = base.get_input_embeddings().weight.detach().float().cpu()
    dice = torch.Generator().manual_seed(recipe.seed)
    noise = torch.randn(recipe.num_prompt_tokens, recipe.ensemble, weight.shape[1], generator=dice)
    return weight.mean(0) + 0.1 * weight.std() * noise


def draw_batch(replies: Sequence[Reply], recipe: Recipe, number: int) -> Batch:
    """Batch `number` of a run, from the seed and `number` alone: each epoch goes through all replies once."""
    picked = []
    for at in range(number * recipe.batch_size, (number + 1) * recipe.batch_size):
        epoch, place = divmod(at, len(replies))
        dice = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
        picked.append(replies[int(torch.randperm(len(replies), generator=dice)[place])])
    return make_batch(picked, recipe, number)


def make_batch(replies: Sequence[Reply], recipe: Recipe, number: int) -> Batch:
    """Pad `replies` and draw up to `recipe.points` insertion points in each, from the seed and `number`."""
    dice = torch.Generator().manual_seed(recipe.seed * 7_368_787 + number)
    ids = [torch.tensor(reply.ids[: recipe.max_length]) for reply in replies]
    drawn = []
    for reply in replies:
        points = torch.tensor(_points(reply, recipe), dtype=torch.long)
        drawn.append(points[torch.randperm(len(points), generator=dice)[: recipe.points]].sort().values)
    pad = torch.nn.utils.rnn.pad_sequence
    return Batch(pad(ids, batch_first=True), pad(drawn, batch_first=True, padding_value=-1))


def _points(reply: Reply, recipe: Recipe) -> range:
    """Positions in the reply after which every prompt token still has a token to guess."""
    length = min(len(reply.ids), recipe.max_length)
    return range(len(reply.prompt) - 1, length - 1 - recipe.num_prompt_tokens)


@torch.no_grad()
def evaluate(base: PreTrainedModel, rows: PromptRows, replies: Sequence[Reply], recipe: Recipe) -> list[list[float]]:
    """Accuracy by distance and rank `[n][10]` on `replies`, at up to `recipe.points` points of each."""
    hits = torch.zeros(recipe.num_prompt_tokens, RANKS, dtype=torch.float64)
    seen = 0
    for number, reply in enumerate(r for r in replies if _points(r, recipe)):
        batch = make_batch([reply], recipe, number).to(base.device)
        taught = rows.to(base.device)(base, batch, recipe.decay)
        top = taught.log_probs.topk(RANKS).indices
        hits += (top == taught.truth[..., None]).double().sum(0).cpu()
        seen += len(top)
    return (hits / max(seen, 1)).tolist()


def _checkpoint(accelerator: Accelerator, folder: Path, step: int, recipe: Recipe) -> None:
    target = folder / f"step-{step:06}"
    if accelerator.is_main_process and not target.exists():
        with staged_folder(target) as staging:
            accelerator.save_state(str(staging))
            (staging / "recipe.json").write_text(json.dumps(asdict(recipe)), encoding="utf-8")
    accelerator.wait_for_everyone()


def _resume(accelerator: Accelerator, folder: Path, recipe: Recipe) -> int:
    """Load the newest checkpoint and return its step, 0 without one."""
    found = sorted(folder.glob("step-*"))
    if not found:
        return 0
    if json.loads((found[-1] / "recipe.json").read_text(encoding="utf-8")) != asdict(recipe):
        raise ValueError(f"{found[-1]} was written by another recipe: give an empty folder or remove it")
    accelerator.load_state(str(found[-1]))
    return int(found[-1].name.removeprefix("step-"))


def _progress() -> Progress:
    columns = (
        "[progress.description]{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    told = TextColumn("loss {task.fields[loss]:.3f}  top-1 by distance {task.fields[top1]}")
    bar = Progress(*columns, told)
    add = bar.add_task
    bar.add_task = lambda *a, **k: add(*a, loss=math.nan, top1="", **k)  # type: ignore[method-assign]
    return bar


def _percent(shares: list[float]) -> str:
    return "/".join(f"{100 * share:.0f}%" for share in shares)
