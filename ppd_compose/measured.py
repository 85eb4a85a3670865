"""The budget measured on this machine, kept in the user's cache, and corrected by what forwards then take.

Knows what a measurement depends on. How it is measured is `budget`.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict, deque
from contextlib import suppress
from pathlib import Path
from statistics import median

import torch
from transformers import PreTrainedModel

from .budget import Budget
from .forward import forward_of
from .hookspecs import hookimpl
from .identity import Identity, device_name
from .mask import implementation
from .step import Step
from .storage import cache_folder

ENOUGH = 32  # forwards of one number of rows before they are compared
RECENT = 0.1  # weight of a forward in what those around it take
LATEST = 300  # forwards that are compared: no more, as the machine may have been busy before
TOLERANCE = 1.1  # ratio of two sizes' disagreements from which the budget is corrected
FORWARDS = 5  # another number where this project's forwards come to take otherwise


def measured_budget(model: PreTrainedModel, again: bool = False) -> Budget:
    """Load the budget of `model` on this device, or measure and keep it, `again` even where there is one.

    A file that cannot be read is measured anew; where nothing can be kept, the budget lasts as long as the model.
    """
    if not again:
        with suppress(OSError, ValueError):
            return Budget.load(_path(model))
    budget = Budget.measure(model)
    with suppress(OSError):
        budget.save(_path(model))
    return budget


class Watch:
    """Observer: whether forwards take what the budget says.

    A machine that was busy while it was measured gives a curve of the wrong shape. What matters is how forwards of
    different rows compare; a machine that is slower throughout wants the same rows. So each forward is compared with
    those just before it: between one text and the next the machine changes more than between sizes.
    """

    name = "budget-watch"

    def __init__(self) -> None:
        # Measured rows nearest to a forward's, its ratio to the budget, and the same by those before it.
        self.latest: deque[tuple[int, float, float]] = deque(maxlen=LATEST)
        self.pace: float | None = None  # ratio of the forwards just before

    @hookimpl
    def observe(self, step: Step) -> None:
        """Compare one forward with the budget."""
        budget = step.budget
        if step.index == 1:
            self.pace = None
        known = len(budget.contexts) == 1 or len(step.ids) <= budget.contexts[-1]
        if step.index > 1 and step.rows <= budget.max_rows and known:
            told = float(budget.curve(step.length)[step.rows - 1])
            nearest, ratio = min(budget.rows, key=lambda rows: abs(rows - step.rows)), step.seconds / told
            if self.pace is not None:
                self.latest.append((nearest, ratio, ratio / self.pace))
            self.pace = ratio if self.pace is None else (1 - RECENT) * self.pace + RECENT * ratio

    def kept_true(self, model: PreTrainedModel, budget: Budget) -> Budget:
        """`budget`, the measured one of `model`, or a corrected one, kept from now on, where they disagree."""
        ratios: dict[int, list[float]] = defaultdict(list)
        latest = list(self.latest)  # another thread may add to it meanwhile
        for rows, _, relative in latest:
            ratios[rows].append(relative)
        typical = {rows: median(mine) for rows, mine in ratios.items() if len(mine) >= ENOUGH}
        if len(typical) < 2 or max(typical.values()) < TOLERANCE * min(typical.values()):
            return budget
        most = max(typical, key=lambda rows: len(ratios[rows]))  # the size by which all others are scaled
        level = median(ratio for rows, ratio, _ in latest if rows == most) / typical[most]
        self.latest.clear()
        budget = budget.corrected({rows: level * relative for rows, relative in typical.items()})
        with suppress(OSError):  # a cache that cannot be written is no reason not to decode
            budget.save(_path(model))
        return budget


def _path(model: PreTrainedModel) -> Path:
    """One file for each thing that changes the seconds of a forward."""
    device, forward = device_name(model), forward_of(model)
    threads = torch.get_num_threads() if model.device.type == "cpu" else 0
    identity = Identity.of(model)
    layers = model.config.get_text_config().num_hidden_layers
    tensors = (*model.parameters(), *model.buffers())  # quantised weights may be either
    kinds = sorted({f"{type(tensor).__name__} {tensor.dtype}" for tensor in tensors})
    places = sorted(map(str, (getattr(model, "hf_device_map", None) or {}).values()))
    facts = [
        identity.fingerprint,
        layers,
        device,
        str(model.dtype),
        kinds,
        places,
        implementation(model),
        threads,
        forward.kind,
        forward.sizes,
        FORWARDS,
    ]
    key = hashlib.sha256(json.dumps([*facts, torch.__version__]).encode()).hexdigest()[:16]
    return cache_folder() / "budgets" / f"{key}.json"
