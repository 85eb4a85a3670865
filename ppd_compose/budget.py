"""The seconds of a verify forward on this machine, by rows and context.

Knows how they are measured. Which rows are worth theirs is `rows`.
"""

from __future__ import annotations

import json
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from .cache import commit, recording, refuse_forgetful, with_cache
from .device import wait
from .forward import forward_of
from .storage import write_text
from .tree import Floats, TokenTree
from .verify import Context, only_last, verify

MEASURED_CONTEXTS = (128, 640)
BATCHES = 5  # of rounds at most, while they find faster forwards
SETTLED = 0.97  # how much faster does not matter
ENOUGH = 0.5  # seconds for one size: a forward that takes long is hardly longer for what else the machine does
LARGEST, MOST_ROWS, MOST_CONTEXTS = 2**20, 2**12, 64  # that are believed


@dataclass(frozen=True)
class Budget:
    """Seconds of one verify forward on one machine, `seconds[context][rows]` at the sizes named.

    Raises:
        ValueError: sizes that do not ascend, from 1 row, or are too large; another shape than theirs; or seconds that
            are no positive numbers.
    """

    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        shape = (len(self.contexts), len(self.rows))
        for what, sizes, most in (("rows", self.rows, MOST_ROWS), ("contexts", self.contexts, LARGEST)):
            if any(type(n) is not int or not 0 <= n <= most for n in sizes):
                raise ValueError(f"{what} must be whole numbers up to {most}: {sizes}")
        if len(self.contexts) > MOST_CONTEXTS:
            raise ValueError(f"at most {MOST_CONTEXTS} contexts, got {len(self.contexts)}")
        table = np.asarray(self.seconds, float)
        if table.shape != shape or not len(self.rows) or self.rows[0] != 1:
            raise ValueError(
                f"seconds must be {shape} for {shape[0]} contexts and row counts from 1, got {table.shape}"
            )
        if list(self.rows) != sorted(set(self.rows)) or list(self.contexts) != sorted(set(self.contexts)):
            raise ValueError(f"rows and contexts must ascend, got {self.rows} and {self.contexts}")
        if not (table > 0).all() or not (np.isfinite(table)).all():
            raise ValueError("seconds must be positive numbers")

    @classmethod
    def flat(cls, rows: int) -> Budget:
        """Every forward of up to `rows` rows costs the same: a fixed size, whatever the machine. Raises `ValueError`
        for less than one row."""
        if rows < 1:
            raise ValueError(f"a budget needs at least one row, got {rows}")
        return cls((1, rows) if rows > 1 else (1,), (0,), ((1.0, 1.0) if rows > 1 else (1.0,),))

    @classmethod
    @torch.no_grad()
    def measure(cls, model: PreTrainedModel, rounds: int = 4) -> Budget:
        """Time verify forwards of `model` as it is now: sizes interleaved, the fastest of all; some 200 forwards, fewer
        where they take long.

        What else runs on the machine only ever adds time, so the fastest is the truest, and a forward is never taken to
        cost more than one of more rows. As long as another `rounds` find faster ones the machine was busy, and more
        are made, up to `BATCHES` times, but none of a size that has taken `ENOUGH` seconds.
        """
        sizes = forward_of(model).sizes
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or max(MEASURED_CONTEXTS)
        contexts = tuple(c for c in MEASURED_CONTEXTS if c + max(sizes) <= longest) or (1,)
        sizes = tuple(n for n in sizes if min(contexts) + n <= longest) or (1,)  # few where there are few positions
        table = _rising(np.stack([_fastest(model, sizes, context, rounds) for context in contexts]))
        return cls(sizes, contexts, tuple(map(tuple, table.tolist())))

    @property
    def fixed(self) -> bool:
        """Whether it is a number of rows alone, as `flat` makes it, and tells nothing of seconds."""
        return self.contexts == (0,) and len(set(self.seconds[0])) == 1

    @property
    def max_rows(self) -> int:
        """The most rows that one forward may have."""
        return self.rows[-1]

    def curve(self, context: int) -> Floats:
        """Seconds of a forward of 1, 2, ... rows at `context` cached tokens, interpolated `[max rows]`; read-only."""
        above = bisect_right(self.contexts, context)
        low, high = max(above - 1, 0), min(above, len(self.contexts) - 1)
        curve: Floats = self._curves[low]
        if low < high:
            share = (context - self.contexts[low]) / (self.contexts[high] - self.contexts[low])
            curve = curve + share * (self._curves[high] - curve)
            curve.flags.writeable = False  # as those at hand are
        return curve

    @cached_property
    def _curves(self) -> Floats:
        """The same `[contexts, max rows]`, at the contexts named."""
        curves = np.stack([np.interp(np.arange(1, self.max_rows + 1), self.rows, row) for row in self.seconds])
        curves.flags.writeable = False  # these are handed out
        return curves

    def corrected(self, ratios: Mapping[int, float]) -> Budget:
        """The same where forwards of some numbers of rows take `ratios` times what it says; between those numbers the
        ratio is interpolated, beyond them it is that of the nearest."""
        rows = sorted(ratios)
        factors = np.interp(self.rows, rows, [ratios[n] for n in rows])
        table = _rising(np.asarray(self.seconds) * factors)
        return Budget(self.rows, self.contexts, tuple(map(tuple, table.tolist())))

    def save(self, path: Path) -> None:
        """Write as JSON."""
        write_text(path, json.dumps({"rows": self.rows, "contexts": self.contexts, "seconds": self.seconds}))

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Budget:
        """From its fields as plain data. Raises `KeyError`, `TypeError`, `ValueError` or `OverflowError` when they are
        none."""
        seconds = tuple(tuple(map(float, row)) for row in data["seconds"])
        return cls(tuple(data["rows"]), tuple(data["contexts"]), seconds)

    @classmethod
    def load(cls, path: Path) -> Budget:
        """Read what `save` wrote. Raises `ValueError` naming the file when it is something else."""
        try:
            return cls.of(json.loads(path.read_text(encoding="utf-8")))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path} is no budget: {error}") from None


def _rising(table: Floats) -> Floats:
    """`table` `[contexts, rows]`, where no forward costs more than one of more rows."""
    rising: Floats = np.minimum.accumulate(table[:, ::-1], axis=1)[:, ::-1]
    return rising


def _fastest(model: PreTrainedModel, sizes: Sequence[int], context: int, rounds: int) -> Floats:
    """Seconds of the fastest forward of each of `sizes` rows below `context` tokens."""
    cache = filled(model, context)
    fastest, spent = np.full(len(sizes), np.inf), np.zeros(len(sizes))

    def go_round() -> None:
        for at, rows in enumerate(sizes):
            if spent[at] < ENOUGH:
                seconds = _time_forward(model, cache, rows)
                fastest[at], spent[at] = min(fastest[at], seconds), spent[at] + seconds

    with recording(cache), forward_of(model).laid_out(cache, torch.ones(context, dtype=torch.bool, device="cpu")):
        go_round()
        spent[:] = 0  # that one warmed up
        for batch in range(BATCHES):
            before = fastest.copy()
            for _ in range(rounds):
                go_round()
            if batch and (fastest > SETTLED * before).all():
                break
    return fastest


def filled(model: PreTrainedModel, context: int) -> DynamicCache:
    """A cache of `context` tokens of no meaning."""
    cache = DynamicCache(config=model.config)
    ids = torch.arange(context, device=model.device)[None] % model.config.get_text_config().vocab_size
    model(input_ids=ids, **with_cache(model, cache), **only_last(model))
    refuse_forgetful(model, cache, context)
    return cache


def _time_forward(model: PreTrainedModel, cache: DynamicCache, rows: int) -> float:
    """Seconds of one forward of a chain of `rows` below `cache`, which stays as it is."""
    tree = TokenTree.chain(0, [0] * (rows - 1), [0.0] * (rows - 1))
    context = Context.of(torch.ones(int(cache.get_seq_length()), dtype=torch.bool, device=model.device))
    forward = forward_of(model)
    wait(forward.device)
    begin = time.perf_counter()
    verified = verify(forward, cache, context, tree, (), {})
    seconds = time.perf_counter() - begin
    commit(cache, verified.rows, [])
    return seconds
