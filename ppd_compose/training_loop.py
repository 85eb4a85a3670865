"""A training run: which replies a step sees, optimiser, checkpoints, resumption and progress.

Knows accelerate and the order of the data. Does not know what is trained, nor its loss.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from .checkpoints import checkpoint, resume
from .modes import evaluating
from .replies import Reply

Module = TypeVar("Module", bound=nn.Module)

SEEDS = 2**32  # that NumPy takes
RATES = ("learning_rate", "decay")


@dataclass(frozen=True)
class Recipe:
    """All that decides what comes out of a training, beside the base and the replies; each drafter adds its own."""

    steps: int = 1000
    batch_size: int = 1
    points: int = 48  # positions of each reply at which the drafter guesses
    max_length: int = 512  # tokens of prompt and reply that are used
    learning_rate: float = 1e-2
    warmup: int = 20
    decay: float = 0.8  # of the loss with every further distance
    seed: int = 0
    checkpoint_every: int = 100
    may_be_zero: ClassVar[tuple[str, ...]] = ("warmup",)

    def __post_init__(self) -> None:
        """Raises `ValueError` for numbers with which nothing can be trained."""
        for name, value in asdict(self).items():
            least = 0 if name in self.may_be_zero else 1
            if isinstance(value, int) and value < least and name not in ("seed", *RATES):
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < SEEDS:
            raise ValueError(f"seed must be a whole number from 0 to {SEEDS - 1}, got {self.seed!r}")
        for name in RATES:
            if not (rate := getattr(self, name)) > 0 or not math.isfinite(rate):
                raise ValueError(f"{name} must be a finite number above 0, got {rate}")


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


@dataclass(frozen=True)
class Taught:
    """What one batch gave: the loss, and by distance in which share of the points the first guess was right."""

    loss: Tensor  # scalar
    top1: Tensor  # [distances]


def run(
    module: Module,
    recipe: Recipe,
    folder: Path,
    replies: Sequence[Reply],
    step: Callable[[Module, int], Taught],
    also: Mapping[str, Any] | None = None,
) -> Module:
    """Train the parameters of `module` that want gradients, resuming from the newest checkpoint in `folder`.

    `step(module, number)` gives the loss of batch `number`, counted from 0 over all processes. The same recipe and
    data give the same parameters on the same machine, whether or not the run was interrupted. `replies` are what
    the steps learn from, `also` what else decides what comes out, as plain data.
    Raises `ValueError` when `folder` holds checkpoints of another recipe, of other replies or of another beginning, and
    when training diverged.
    """
    set_seed(recipe.seed)
    accelerator = Accelerator(device_placement=False)  # see `placed`
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.0, fused=True)
    processes = accelerator.num_processes  # a prepared schedule takes a step for each
    schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup * processes, recipe.steps * processes)
    model, optimizer, schedule = accelerator.prepare(module, optimizer, schedule)
    facts = {**asdict(recipe), **(also or {}), "processes": processes, "begun_with": _digest(trained, replies)}
    done = resume(accelerator, folder, facts)
    with _progress() as bar:
        task = bar.add_task("training", total=recipe.steps, completed=done, loss=math.nan, top1="")
        for number in range(done, recipe.steps):
            taught = step(model, number * processes + accelerator.process_index)
            accelerator.backward(taught.loss)
            accelerator.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            _tell(bar, task, number + 1, taught)
            if (number + 1) % recipe.checkpoint_every == 0 or number + 1 == recipe.steps:
                _check_finite(trained, recipe)
                checkpoint(accelerator, folder, number + 1, facts)
    return module


@contextmanager
def frozen(base: Any) -> Iterator[None]:
    """The base `placed`, without gradients and in evaluation mode; afterwards as it was, there.

    Raises `ValueError` for one that is spread over several devices.
    """
    if len(set((getattr(base, "hf_device_map", None) or {}).values())) > 1:
        raise ValueError(f"the base is spread over {base.hf_device_map}: training needs it on one device, device_map=0")
    placed(base)
    trainable = [p for p in base.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with evaluating(base):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def placed(model: Any) -> Any:
    """`model` where this process trains: where it is, or of several processes on a device of its own."""
    state = PartialState()
    return model.to(state.device) if state.num_processes > 1 else model


def within_window(recipe: AnyRecipe, model: PreTrainedModel, ahead: int) -> AnyRecipe:
    """`recipe` with sequences so short that `ahead` rows below their end still see all of them in `model`."""
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("sliding_window", "max_position_embeddings")]
    return replace(recipe, max_length=min([recipe.max_length, *(limit - ahead for limit in limits if limit)]))


def replies_of_batch(replies: Sequence[Reply], recipe: Recipe, number: int) -> list[Reply]:
    """Replies of batch `number`, from the seed and `number` alone: each epoch goes through all replies once."""
    picked = []
    for at in range(number * recipe.batch_size, (number + 1) * recipe.batch_size):
        epoch, place = divmod(at, len(replies))
        dice = torch.Generator("cpu").manual_seed(recipe.seed * 1_000_003 + epoch)
        picked.append(replies[int(torch.randperm(len(replies), generator=dice, device="cpu")[place])])
    return picked


def points_of(reply: Reply, recipe: Recipe, ahead: int) -> range:
    """Positions from the prompt's last token on after which `ahead` more tokens follow the next one."""
    length = min(len(reply.ids), recipe.max_length)
    return range(len(reply.prompt) - 1, length - 1 - ahead)


def draw_points(reply: Reply, recipe: Recipe, ahead: int, dice: torch.Generator) -> Tensor:
    """Up to `recipe.points` of `points_of(...)`, ascending `[count]` int64."""
    points = torch.tensor(points_of(reply, recipe, ahead), dtype=torch.long, device="cpu")
    return points[torch.randperm(len(points), generator=dice, device="cpu")[: recipe.points]].sort().values


def dice_of(recipe: Recipe, number: int) -> torch.Generator:
    """The random numbers of batch `number`."""
    return torch.Generator("cpu").manual_seed(recipe.seed * 7_368_787 + number)


def usable(replies: Sequence[Reply], recipe: Recipe, ahead: int) -> list[Reply]:
    """Those of `replies` with a position to learn from, warning when fewer than half are; none is a `ValueError`."""
    found = [reply for reply in replies if points_of(reply, recipe, ahead)]
    many = "none" if not found else f"only {len(found)}"
    told = (
        f"{many} of {len(replies)} replies can be used: {ahead + 1} tokens of a reply must lie within the first "
        f"{recipe.max_length} of prompt and reply (max_length)"
    )
    if not found:
        raise ValueError(f"{told}: give other prompts, or a larger max_length where the base allows it")
    if 2 * len(found) < len(replies):
        warnings.warn(told, stacklevel=3)
    return found


def _digest(parameters: Iterable[Tensor], replies: Sequence[Reply]) -> str:
    """Tells trainings apart that begin with other `parameters`, or learn from other replies."""
    digest = hashlib.sha256(json.dumps([reply.ids for reply in replies]).encode())
    for parameter in parameters:
        digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _check_finite(parameters: Iterable[Tensor], recipe: Recipe) -> None:
    if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
        raise ValueError(f"training diverged at a learning rate of {recipe.learning_rate}: take a smaller one")


def _tell(bar: Progress, task: TaskID, step: int, taught: Taught) -> None:
    loss, top1 = taught.loss.item(), "/".join(f"{100 * share:.0f}%" for share in taught.top1.tolist())
    bar.update(task, advance=1, loss=loss, top1=top1)
    if step % 100 == 0:
        bar.console.print(f"step {step}: loss {loss:.3f}, top-1 {top1}")


def _progress() -> Progress:
    columns = (
        "[progress.description]{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}  top-1 by distance {task.fields[top1]}"))
