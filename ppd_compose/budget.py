"""How many rows to verify: as many as make the most tokens per second on this machine.

Knows seconds by rows and context, and the price of a row. Does not know drafters.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from .forward import forward_of
from .hookspecs import hookimpl
from .step import Step
from .storage import write_text
from .tree import Appended, Floats, Ints, TokenTree, cut, stacked_parents
from .verify import Context, verify

MEASURED_ROWS = (1, 2, 4, 8, 16, 32, 64)
MEASURED_CONTEXTS = (128, 640)
STRIDE = 4  # forwards have one row, a multiple of this, or all rows there are
FORGET = 0.95  # how much of the past counts after each step, in the running tokens per second


@dataclass(frozen=True)
class Budget:
    """Seconds of one verify forward on one machine, `seconds[context][rows]` at the sizes named."""

    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        shape = (len(self.contexts), len(self.rows))
        table = np.asarray(self.seconds, float)
        if table.shape != shape or not len(self.rows) or self.rows[0] != 1:
            raise ValueError(
                f"seconds must be {shape} for {shape[0]} contexts and row counts from 1, got {table.shape}"
            )
        if not (table > 0).all() or not (np.isfinite(table)).all():
            raise ValueError("seconds must be positive numbers")

    @classmethod
    def flat(cls, rows: int) -> Budget:
        """Every forward of up to `rows` rows costs the same: a fixed size, whatever the machine."""
        if rows < 1:
            raise ValueError(f"a budget needs at least one row, got {rows}")
        return cls((1, rows) if rows > 1 else (1,), (0,), ((1.0, 1.0) if rows > 1 else (1.0,),))

    @classmethod
    @torch.no_grad()
    def measure(cls, model: PreTrainedModel, rounds: int = 5) -> Budget:
        """Time verify forwards of `model` as it is now: sizes interleaved, the fastest of `rounds` (seconds in all).

        What else runs on the machine only ever adds time, so the fastest is the truest; within a context the seconds
        are made to rise with the rows.
        """
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or max(MEASURED_CONTEXTS)
        contexts = tuple(c for c in MEASURED_CONTEXTS if c + max(MEASURED_ROWS) <= longest) or (1,)
        table = []
        for context in contexts:
            cache = _filled(model, context)
            times = {n: [_time_forward(model, cache, n)] for n in MEASURED_ROWS}  # the first warms up
            for n in MEASURED_ROWS * rounds:
                times[n].append(_time_forward(model, cache, n))
            fastest = [min(times[n][1:]) for n in MEASURED_ROWS]
            table.append(tuple(np.maximum.accumulate(fastest).tolist()))
        return cls(MEASURED_ROWS, contexts, tuple(table))

    @property
    def max_rows(self) -> int:
        """The most rows that one forward may have."""
        return self.rows[-1]

    def curve(self, context: int) -> Floats:
        """Seconds of a forward of 1, 2, ... rows at `context` cached tokens, interpolated `[max rows]`."""
        at = np.interp(context, self.contexts, np.arange(len(self.contexts)))
        low, high = self.seconds[int(at)], self.seconds[min(int(at) + 1, len(self.contexts) - 1)]
        mixed = np.asarray(low) + (at - int(at)) * (np.asarray(high) - np.asarray(low))
        curve: Floats = np.interp(np.arange(1, self.rows[-1] + 1), self.rows, mixed)
        return curve

    def save(self, path: Path) -> None:
        """Write as JSON."""
        write_text(path, json.dumps({"rows": self.rows, "contexts": self.contexts, "seconds": self.seconds}))

    @classmethod
    def load(cls, path: Path) -> Budget:
        """Read what `save` wrote. Raises `ValueError` naming the file when it is something else."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return cls(tuple(data["rows"]), tuple(data["contexts"]), tuple(map(tuple, data["seconds"])))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no budget: {error}") from None


def _filled(model: PreTrainedModel, context: int) -> DynamicCache:
    """A cache of `context` tokens of no meaning."""
    cache = DynamicCache(config=model.config)
    ids = torch.arange(context, device=model.device)[None] % model.config.get_text_config().vocab_size
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    forward_of(model).lay_out(cache)
    return cache


def _time_forward(model: PreTrainedModel, filled: DynamicCache, rows: int) -> float:
    """Seconds of one forward of a chain of `rows` below `filled`, which stays as it is."""
    cache = copy.deepcopy(filled)
    tree = TokenTree.chain(0, [0] * (rows - 1), [0.0] * (rows - 1))
    context = Context(torch.ones(int(cache.get_seq_length()), dtype=torch.bool))
    _wait(model)
    begin = time.perf_counter()
    verify(forward_of(model), cache, context, tree, (), {})
    _wait(model)
    return time.perf_counter() - begin


def _wait(model: PreTrainedModel) -> None:
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)


@dataclass
class _Pace:
    """Running sums of one sequence, and the seconds by rows of its current step."""

    tokens: float = 0.0
    seconds: float = 0.0
    curve: Floats = field(default_factory=lambda: np.ones(1))


class BestRows:
    """Candidates and appended rows compete row by row for expected tokens per second.

    A candidate earns the chance that its path is accepted, an appended row its gain. The cut maximises
    (expected tokens) - (long-run tokens per second) x (seconds), which is optimal in the long run when steps
    differ; before any step is known, (expected tokens) / (seconds). Of all cuts those of one row, of a multiple of
    four, and of all rows are tried. That is PPD's dynamic sparse tree (section 4) without its offline tables, for any
    mix of drafters.
    """

    @hookimpl(trylast=True)
    def fit(self, step: Step, tree: TokenTree, appended: Sequence[Appended]) -> tuple[TokenTree, list[Appended]]:
        """Take rows in order of what they earn, a parent before its children, while that pays."""
        values = _capped(stacked_parents(tree, appended), tree, appended)
        pace = step.memory.setdefault(self, _Pace())
        pace.curve = step.budget.curve(len(step.ids))
        best = np.argsort(-values, kind="stable")[: len(pace.curve)]
        earned, seconds = np.cumsum(values[best]), pace.curve[: len(best)]
        worth = earned - pace.tokens / pace.seconds * seconds if pace.seconds else earned / seconds
        # Kernels are made and kept for every number of rows, a megabyte or more each: few sizes keep the memory low.
        sizes = np.union1d(np.arange(STRIDE, len(best) + 1, STRIDE), [1, len(best)])
        keep = np.sort(best[: sizes[np.argmax(worth[sizes - 1])]])
        return cut(tree, appended, keep)

    @hookimpl
    def observe(self, step: Step) -> None:
        """Keep running sums of tokens and of the budget's own seconds."""
        pace = step.memory.get(self)
        if pace is None:  # another plugin decides what fits
            return
        pace.tokens = FORGET * pace.tokens + len(step.path)
        pace.seconds = FORGET * pace.seconds + float(pace.curve[step.rows - 1])


def _capped(parents: Ints, tree: TokenTree, appended: Sequence[Appended]) -> Floats:
    """What each row earns, at most what the row it hangs from earns, so that a cut never orphans a row."""
    values: Floats = np.concatenate([np.exp(tree.log_probs), *(rows.gains for rows in appended)])
    parents = np.maximum(parents, 0)
    while ((above := values[parents]) < values).any():  # once for every level that holds back a lower one
        values = np.minimum(values, above)
    return values
