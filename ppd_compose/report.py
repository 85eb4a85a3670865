"""Benchmark results as one self-contained page.

Knows the schema of `ppd-compose bench` and lays its figures out for the template, which knows how they look.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError

from .bench_job import SCHEMA
from .budget import Budget
from .shipped import DATA
from .sources import read_object
from .storage import write_text

WIDTH, HEIGHT, MARGIN = 640, 240, 44  # of a chart, in units of its own
SQUARE = 32, 208  # where the charts of claimed chances begin and end, both ways
DEEPEST = 8  # depth whose acceptance is told
NODE_WIDTH, NODE_HEIGHT = 92, 46  # of a drawn tree


def write_report(sources: Sequence[Path], target: Path) -> None:
    """Write the page about the results in `sources` to `target`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: one is no result of `ppd-compose bench`, or of another version.
    """
    results = [(path, _read(path)) for path in sources]
    pages = Environment(
        loader=FileSystemLoader(DATA), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template, shown = pages.get_template("report.html.j2"), []
    for path, result in results:
        try:
            shown.append(laid_out(result))
            template.render(results=shown[-1:])  # each alone first, so that an error can name its file
        except (LookupError, TypeError, ValueError, AttributeError, UndefinedError) as error:
            raise ValueError(
                f"{path} lacks what a page tells, or tells it otherwise ({error!r}): run it again"
            ) from None
    write_text(target, template.render(results=shown))


def laid_out(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows of one result."""
    runs = result["runs"]
    drafters = list(dict.fromkeys(name for run in runs for name in run["acceptance"]))
    categories = list(result["base"]["by_category"])
    return {
        "environment": result["environment"],
        "base": result["base"],
        "temperature": result.get("protocol", {}).get("temperature", 0),
        "categories": categories,
        "runs": [{**run, "spread": _spread(run)} for run in runs],
        "fastest": {c: max(run["by_category"][c]["speedup"] for run in runs) for c in categories},
        "gain": composition_gain(runs),
        "drafters": drafters,
        "deepest": DEEPEST,
        "latency": [_latency(name, budget, runs) for name, budget in _different(result.get("budgets", {})).items()],
        "acceptance": [_acceptance(run) for run in runs if run["acceptance"]],
        "reliability": [_reliability(run) for run in runs if run.get("reliability")],
        "square": SQUARE,
        "traces": [_trace(name, told, drafters) for name, told in result.get("traces", {}).items()],
        "shown": max(runs, key=lambda run: run["speedup"] if run["name"] in result.get("traces", {}) else 0)["name"],
    }


def composition_gain(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The best composition against the best single drafter, None when one of the two was not run."""
    mine = [run for run in runs if run["acceptance"]]
    single, several = ([r for r in mine if (len(r["acceptance"]) > 1) is many] for many in (False, True))
    if not single or not several:
        return None
    best, rival = (max(those, key=lambda run: run["speedup"]) for those in (several, single))
    return {"best": best, "rival": rival, "ratio": best["speedup"] / rival["speedup"]}


def _read(path: Path) -> dict[str, Any]:
    told = read_object(path)
    if told.get("schema") != SCHEMA:
        raise ValueError(f"{path} is no result of ppd-compose bench of schema {SCHEMA}: schema {told.get('schema')!r}")
    return told


def _spread(run: Mapping[str, Any]) -> str:
    rounds = run.get("speedup_by_round", [])
    return f"{min(rounds):.2f} to {max(rounds):.2f}" if len(rounds) > 1 else ""


def _different(budgets: Mapping[str, Any]) -> dict[str, Any]:
    """Budgets by the first contender that has them: compositions of one way share theirs."""
    found: dict[str, Any] = {}
    for name, budget in budgets.items():
        if budget is not None and len(set(budget["seconds"][0])) > 1 and budget not in found.values():
            found[name] = budget
    return found


def _latency(name: str, told: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Curves as points of a chart, and where each contender's average forward lies on the first."""
    budget = Budget.of(told)
    highest = max(float(budget.curve(context)[-1]) for context in budget.contexts)

    def place(rows: float, seconds: float) -> tuple[float, float]:
        x = MARGIN + (rows - 1) / max(budget.max_rows - 1, 1) * (WIDTH - 2 * MARGIN)
        return round(x, 1), round(HEIGHT - MARGIN - seconds / highest * (HEIGHT - 2 * MARGIN), 1)

    curve = budget.curve(budget.contexts[0])
    marks = []
    for run in runs:
        rows = run["rows_per_forward"]
        if run["acceptance"] and 1 <= rows <= budget.max_rows:
            marks.append((*place(rows, float(curve[round(rows) - 1])), run["name"]))
    ticks = [(*place(n, 0), n) for n in budget.rows if n in (1, 8, 16, 32, 48, 64)]
    levels = [(*place(1, s), f"{1000 * s:.0f}") for s in (0.0, highest / 2, highest)]
    lines = [
        (f"{context} tokens cached", [place(n + 1, float(s)) for n, s in enumerate(budget.curve(context))])
        for context in budget.contexts
    ]
    return {"name": name, "lines": lines, "marks": marks, "ticks": ticks, "levels": levels,
            "width": WIDTH, "height": HEIGHT}  # fmt: skip


def _acceptance(run: Mapping[str, Any]) -> dict[str, Any]:
    deepest = min(DEEPEST, max((int(depth) for shares in run["acceptance"].values() for depth in shares), default=1))
    rows = {
        name: [float({int(d): s for d, s in shares.items()}.get(depth, 0.0)) for depth in range(1, deepest + 1)]
        for name, shares in run["acceptance"].items()
    }
    return {"name": run["name"], "depths": list(range(1, deepest + 1)), "rows": rows}


def _reliability(run: Mapping[str, Any]) -> dict[str, Any]:
    """Points of claimed chance and what came of it, larger where there were more guesses."""
    (near, far), most = SQUARE, max(tenth["guesses"] for tenth in run["reliability"])
    points = [
        {
            "x": round(near + tenth["claimed"] * (far - near), 1),
            "y": round(far - tenth["right"] * (far - near), 1),
            "r": round(2 + 6 * (tenth["guesses"] / most) ** 0.5, 1),
            "told": f"{tenth['guesses']:.0f} guesses: claimed {tenth['claimed']:.2f}, right {tenth['right']:.2f}",
        }
        for tenth in run["reliability"]
    ]
    return {"name": run["name"], "points": points}


def _trace(name: str, told: Mapping[str, Any], drafters: Sequence[str]) -> dict[str, Any]:
    tokens = [{**token, "colour": _colour(token["drafters"], drafters)} for token in told["tokens"]]
    step = told["step"]
    tree = None if step is None else _tree(step["nodes"], drafters)
    guessed = sum(bool(token["drafters"]) for token in tokens)
    return {"name": name, "tokens": tokens, "tree": tree, "guessed": guessed}


def _colour(names: Sequence[str], drafters: Sequence[str]) -> int:
    """Number of the colour: that of the first drafter, 0 for the model's own."""
    return 1 + min(drafters.index(name) for name in names) % 6 if names else 0


def _tree(nodes: Sequence[Mapping[str, Any]], drafters: Sequence[str]) -> dict[str, Any]:
    """Nodes placed by depth and order, leaves one below the other."""
    depths, lines = [0] * len(nodes), [0.0] * len(nodes)
    children: dict[int, list[int]] = {}
    for node, told in enumerate(nodes[1:], 1):
        depths[node] = depths[told["parent"]] + 1
        children.setdefault(told["parent"], []).append(node)
    leaf = 0
    for node in _leaves_first(children):
        if node in children:
            lines[node] = lines[children[node][0]]
        else:
            lines[node], leaf = float(leaf), leaf + 1
    places = [(depth * NODE_WIDTH, line * NODE_HEIGHT) for depth, line in zip(depths, lines, strict=True)]
    drawn = [
        {**told, "x": x, "y": y, "colour": _colour(told["drafters"], drafters)}
        for told, (x, y) in zip(nodes, places, strict=True)
    ]
    edges = [(*places[told["parent"]], *places[node], told["accepted"]) for node, told in enumerate(nodes) if node]
    return {"nodes": drawn, "edges": edges, "width": (max(depths) + 1) * NODE_WIDTH, "height": leaf * NODE_HEIGHT}


def _leaves_first(children: Mapping[int, Sequence[int]]) -> list[int]:
    """All nodes, each after those below it, the first child's before the next child's."""
    order: list[int] = []
    stack = [(0, False)]
    while stack:
        node, seen = stack.pop()
        if seen or node not in children:
            order.append(node)
        else:
            stack.append((node, True))
            stack += [(child, False) for child in reversed(children[node])]
    return order
