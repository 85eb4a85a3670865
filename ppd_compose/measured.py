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

from .budget import MEASURED_ROWS, Budget
from .forward import forward_of
from .hookspecs import hookimpl
from .identity import Identity, device_name
from .step import Step
from .storage import cache_folder

ENOUGH = 24  # forwards of one number of rows before they are compared
LATEST = 300  # forwards that are compared: no more, as the machine may have been busy before
TOLERANCE = 1.1  # ratio of two sizes' disagreements from which the budget is corrected
FORWARDS = 3  # another number where this project's forwards come to take otherwise


def measured_budget(model: PreTrainedModel, again: bool = False) -> Budget:
    """Load the budget of `model` on this device, or measure and keep it, `again` even where there is one."""
    path = _path(model)
    if path.exists() and not again:
        return Budget.load(path)
    budget = Budget.measure(model)
    budget.save(path)
    return budget


class Watch:
    """Observer: whether forwards take what the budget says.

    A machine that was busy while it was measured gives a curve of the wrong shape. What matters is how forwards of
    different rows compare; a machine that is slower throughout wants the same rows.
    """

    name = "budget-watch"

    def __init__(self) -> None:
        self.latest: deque[tuple[int, float]] = deque(maxlen=LATEST)  # measured rows nearest to a forward's, and ratio

    @hookimpl
    def observe(self, step: Step) -> None:
        """Compare one forward with the budget."""
        budget = step.budget
        known = len(budget.contexts) == 1 or len(step.ids) <= budget.contexts[-1]
        if step.index > 1 and step.rows <= budget.max_rows and known:
            told = float(budget.curve(len(step.ids))[step.rows - 1])
            nearest = min(budget.rows, key=lambda rows: abs(rows - step.rows))
            self.latest.append((nearest, step.seconds / told))

    def kept_true(self, model: PreTrainedModel, budget: Budget) -> Budget:
        """`budget`, the measured one of `model`, or a corrected one, kept from now on, where they disagree."""
        ratios: dict[int, list[float]] = defaultdict(list)
        for rows, ratio in self.latest:
            ratios[rows].append(ratio)
        typical = {rows: median(mine) for rows, mine in ratios.items() if len(mine) >= ENOUGH}
        if len(typical) < 2 or max(typical.values()) < TOLERANCE * min(typical.values()):
            return budget
        self.latest.clear()
        budget = budget.corrected(typical)
        with suppress(OSError):  # a cache that cannot be written is no reason not to decode
            budget.save(_path(model))
        return budget


def _path(model: PreTrainedModel) -> Path:
    """One file for each thing that changes the seconds of a forward."""
    device = device_name(model)
    threads = torch.get_num_threads() if model.device.type == "cpu" else 0
    identity = Identity.of(model)
    layers = model.config.get_text_config().num_hidden_layers
    kinds = sorted({f"{type(weight).__name__} {weight.dtype}" for weight in model.parameters()})  # quantised or not
    facts = [
        identity.fingerprint,
        layers,
        device,
        str(model.dtype),
        kinds,
        model.config._attn_implementation,
        threads,
        forward_of(model).kind,
        MEASURED_ROWS,
        FORWARDS,
    ]
    key = hashlib.sha256(json.dumps([*facts, torch.__version__]).encode()).hexdigest()[:16]
    return cache_folder() / "budgets" / f"{key}.json"
