"""What a composition's forwards and drafters take on this machine: measured, told as tables, plotted.

Knows budgets and statistics. What they are used for is `rows`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .bench import greedy
from .budget import Budget
from .environment import environment
from .measured import measured_budget
from .questions import Question
from .storage import staged_file

WHOLE = ("prefill", "call")  # stages of a call, and not of its steps


def profile(model: Any, questions: Sequence[Question], tokens: int, again: bool, command: str) -> dict[str, Any]:
    """Seconds of verify forwards by rows and context, and milliseconds a step by stage, as plain data.

    Args:
        model: a composed one.
        questions: answered with `tokens` tokens each, to time drafters and host work.
        again: measure anew, even where a budget of this model on this machine is kept.
    """
    model.budget = measured_budget(model, again)
    model.warmup()
    seconds: Counter[str] = Counter()
    forwards = 0
    for question in questions:
        greedy(model, question.ids, tokens)
        seconds.update(model.stats.seconds)
        forwards += model.stats.forwards
    stages = {stage: 1000 * spent / max(forwards, 1) for stage, spent in seconds.items() if stage not in WHOLE}
    return {
        "environment": environment(model, command),
        "budget": asdict(model.budget),
        "milliseconds_per_step": stages,
    }


def show(told: Mapping[str, Any], console: Console) -> None:
    """Two tables: forwards by rows and context, with what they must bring; stages of a step."""
    budget = Budget(**told["budget"])
    forwards = Table("rows", title="milliseconds of a verify forward, and tokens that it must bring to be worth them")
    for context in budget.contexts:
        forwards.add_column(f"context {context}", justify="right")
    for at, rows in enumerate(budget.rows):
        cells = [f"{1000 * row[at]:7.1f}  {row[at] / row[0]:5.2f}" for row in budget.seconds]
        forwards.add_row(str(rows), *cells)
    stages = Table("stage", "ms a step", title="what a step takes")
    for stage, spent in told["milliseconds_per_step"].items():
        stages.add_row(Text(stage), f"{spent:.2f}")
    console.print(forwards)
    console.print(stages)


def refuse_plot(target: Path) -> None:
    """Raise `RuntimeError` without matplotlib, and `ValueError` where it draws no files that end as `target` does."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError:
        raise RuntimeError("a plot needs matplotlib: pip install matplotlib, or ppd-compose[plot]") from None
    known = FigureCanvasBase.get_supported_filetypes()
    if _format(target) not in known:
        raise ValueError(f"{target} names no format of a plot by its ending: take one of {', '.join(sorted(known))}")


def _format(target: Path) -> str:
    return target.suffix.removeprefix(".").lower() or "png"


def plot(told: Mapping[str, Any], target: Path) -> None:
    """Draw the latency curves into `target`, in the format that its ending names.

    Raises as `refuse_plot`.
    """
    refuse_plot(target)
    from matplotlib.figure import Figure

    budget, where = Budget(**told["budget"]), told["environment"]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    rows = np.arange(1, budget.max_rows + 1)
    for context in budget.contexts:
        axes.plot(rows, 1000 * budget.curve(context), label=f"{context} tokens cached")
    axes.set(xlabel="rows of a verify forward", ylabel="milliseconds", ylim=(0, None), xlim=(1, budget.max_rows))
    axes.set_title(f"{where['model']}, {where['dtype']}, {where['device']}")
    axes.grid(alpha=0.3)
    axes.legend()
    with staged_file(target) as staging:
        figure.savefig(staging, format=_format(target))
