"""The tables of how fast what decodes: of a whole run, of the README's choice of it, and of pairs.

Knows what `throughput.py` and `ppd-compose bench` write. Does not know where tables stand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
NONE = "none"  # forwards as they are, without any drafter
FIRST = ("ngram+recycling+lookup", "ppd+ngram+recycling+lookup")  # the best without prompt tokens, and of all
PACKED = tuple(f"{drafters} packed" for drafters in (NONE, "ppd", FIRST[1]))  # on the machine where these were run


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def contenders(name: str, forwards: str, pairs: bool = False) -> str:
    """Drafters and compositions in one run, with these `forwards`; `pairs` of drafters too."""
    result = load(name)
    categories = list(result["base"]["by_category"])
    lines = [
        f"{_where(result)}; {result['base']['questions']} Spec-Bench questions, greedy, {forwards}; generate alone "
        f"{result['base']['tokens_per_second']:.1f} tokens/s.",
        "",
        "| contender | tokens/s | identical | tokens per forward | expected | rows | host ms | "
        + " | ".join(categories)
        + " | **all** |",
        "|---" * (len(categories) + 8) + "|",
    ]
    for told in (run for run in result["runs"] if pairs or not _is_pair(run["name"])):
        speeds = [f"{told['by_category'][category]['speedup']:.2f}" for category in categories]
        figures = ["", "", "", ""]
        if told["tokens_per_forward"]:
            figures = [
                f"{told['tokens_per_forward']:.2f}",
                f"{told['expected_per_forward']:.2f}",
                f"{told['rows_per_forward']:.1f}",
                f"{told['host_ms_per_step']:.1f}",
            ]
        figures = [f"{told['tokens_per_second']:.1f}", f"{told['identical']}/{told['questions']}", *figures]
        lines.append(f"| {_called(told)} | {' | '.join([*figures, *speeds])} | **{told['speedup']:.2f}** |")
    return "\n".join(lines)


def speeds() -> str:
    """The drafters alone, the best compositions and other decoders: what README tells of two machines."""
    here, there = load("complete"), load("avx2")
    found = {run["name"]: run for run in there["runs"]}
    lines = [
        "| decoding with | tokens/s | times `generate` | least and most by category | tokens per forward "
        "| times `generate` without AVX-512 |",
        "|---|---|---|---|---|---|",
        f"| `generate` | {here['base']['tokens_per_second']:.1f} | 1 | | 1 | 1 |",
    ]
    for told in (run for run in here["runs"] if _is_told_first(run["name"])):
        by_category = [category["speedup"] for category in told["by_category"].values()]
        other = found.get(told["name"])
        cells = [
            f"{told['tokens_per_second']:.1f}", f"**{told['speedup']:.2f}**",
            f"{min(by_category):.2f} to {max(by_category):.2f}",
            f"{told['tokens_per_forward']:.2f}" if told["tokens_per_forward"] else "",
            f"{other['speedup']:.2f}" if other else "",
        ]  # fmt: skip
        lines.append(f"| {_called(told)} | {' | '.join(cells)} |")
    own = max(at for at, line in enumerate(lines) if " compiled " in line) + 1
    lines[own:own] = [f"| {_called(found[name])} | | | | | {found[name]['speedup']:.2f} |" for name in PACKED]
    return "\n".join(lines)


def _is_told_first(name: str) -> bool:
    drafters, _, way = name.partition(" ")
    return way != "compiled" or drafters.count("+") in (0, 5) or drafters in FIRST


def each() -> str:
    """Every drafter alone and with prompt tokens, and compositions."""
    return contenders("spec-bench-60", "compiled against eager generate", pairs=True)


def pairs() -> str:
    """Speed-up of every pair of drafters, and of each alone, with compiled forwards."""
    speeds = {}
    for run in load("complete")["runs"]:
        listing, _, way = run["name"].partition(" ")
        if way == "compiled":
            speeds[frozenset(listing.split("+"))] = run["speedup"]
    names = [name for drafters in speeds if len(drafters) == 1 for name in drafters if name != NONE]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for mine in names:
        cells = [f"{speeds[frozenset([mine, other])]:.2f}" for other in names[: names.index(mine) + 1]]
        lines.append(f"| {mine} | " + " | ".join(cells + [""] * (len(names) - len(cells))) + " |")
    return "\n".join(lines)


def _called(run: Any) -> str:
    return str(run["name"]).replace(NONE, "no drafter")


def _is_pair(name: str) -> bool:
    return name.count("+") == 1


def chart() -> str:
    """Speed-ups over eager generate, with compiled forwards and of others, as a chart that Markdown viewers draw."""
    ranked = sorted((run for run in load("complete")["runs"] if not _is_pair(run["name"])), key=lambda r: -r["speedup"])
    names = ", ".join(f'"{_called(run).removesuffix(" compiled")}"' for run in ranked)
    speeds = ", ".join(f"{run['speedup']:.2f}" for run in ranked)
    return "\n".join(
        [
            "```mermaid",
            "xychart-beta horizontal",
            '    title "Tokens per second over those of generate"',
            f"    x-axis [{names}]",
            '    y-axis "times as fast" 0 --> 4',
            f"    bar [{speeds}]",
            "```",
        ]
    )


def composed() -> str:
    """Drafters alone and composed, with compiled forwards, and other projects' decoders."""
    return contenders("complete", "compiled against eager generate")


def _where(result: dict[str, Any]) -> str:
    where = result["environment"]
    return (
        f"{where['base'].split('/')[-1]}, {where['dtype']}, {where['device']}, {where['threads']} threads, "
        f"torch {where['versions']['torch'].split('+')[0]}, transformers {where['versions']['transformers']}"
    )
