"""The tables of README.md and RESULTS.md, made from `benchmarks/results/*.json`: run it to write them there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README, MORE = ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md"
NONE = "none"  # forwards as they are, without any drafter
BEHIND = ("each", "pairs", "subsets", "sweep", "ablation", "training")
NAMES = {README: ("chart", "composed", "exactness"), MORE: BEHIND}


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


def subsets() -> str:
    """The best of all sets of so many drafters, by tokens a forward of so many rows, and by seconds where rows cost."""
    rows = (8, 16, 32, 64)
    told = {n: load(f"subsets-{n}-rows")["variants"] for n in rows}
    priced = load("subsets-curve")["variants"]
    lines = [
        "| drafters | " + " | ".join(f"{n} rows: tokens per forward" for n in rows) + " | rows that pay: tokens/s |",
        "|---" * (len(rows) + 2) + "|",
    ]
    for size in range(1, 1 + max(_size(variant) for variant in priced)):
        of_size = [[variant for variant in told[n] if _size(variant) == size] for n in rows]
        best = [max(sets, key=lambda variant: variant["tokens_per_forward"], default=None) for sets in of_size]
        fastest = max((variant for variant in priced if _size(variant) == size), key=_of_forwards)
        cells = [f"{variant['tokens_per_forward']:.2f} {variant['name']}" if variant else "" for variant in best]
        lines.append(f"| {size} | {' | '.join(cells)} | {_of_forwards(fastest):.1f} {fastest['name']} |")
    return "\n".join(lines)


def _size(variant: dict[str, Any]) -> int:
    return 1 + str(variant["name"]).count("+")


def ablation() -> str:
    """Drafters alone, together, and together with one part left out: at 16 rows, and as many as pay when compiled."""
    rows, curve = load("ablation-16-rows"), load("ablation-curve")
    bought = {told["name"]: told for told in curve["variants"]}
    lines = [
        "| | all six, 16 rows: tokens per forward | expected over found | four, rows that pay: tokens per forward "
        "| rows | tokens/s of forwards |",
        "|---|---|---|---|---|---|",
    ]
    for told in rows["variants"]:
        figures = [f"{told['tokens_per_forward']:.2f}", f"{told['expected_over_found']:.2f}", "", "", ""]
        if (four := bought.get(told["name"])) is not None:
            figures[2:] = [
                f"{four['tokens_per_forward']:.2f}", f"{four['rows_per_forward']:.1f}", f"{_of_forwards(four):.1f}"
            ]  # fmt: skip
        lines.append(f"| {told['name']} | {' | '.join(figures)} |")
    return "\n".join(lines)


def sweep() -> str:
    """The budget's own choice over the best fixed number of rows, by drafters and latency curve."""
    sets = load("sweep")["sets"]
    curves = list(sets[0]["curves"])
    lines = ["| drafters | " + " | ".join(curves) + " |", "|---" * (len(curves) + 1) + "|"]
    shown = "{over_best_fixed:.3f} ({rows_per_forward:.1f} rows; {best_fixed})"
    for told in sets:
        cells = [shown.format(**curve) for curve in told["curves"].values()]
        lines.append(f"| {told['drafters']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def training() -> str:
    """First guesses that are right after so much training."""
    lines = ["| drafter | steps, or replies counted | seconds | right by distance |", "|---|---|---|---|"]
    for kind, trainings in load("training")["trainings"].items():
        for told in trainings:
            right = " / ".join(f"{ranks[0]:.2f}" for ranks in told["accuracy"])
            lines.append(f"| {kind} | {told['amount']} | {told['seconds']:.0f} | {right} |")
    return "\n".join(lines)


def _of_forwards(told: dict[str, float]) -> float:
    """Tokens per second where the host takes no time: what ran beside a benchmark makes it slow."""
    if "tokens_per_second_of_forwards" in told:
        return told["tokens_per_second_of_forwards"]
    tokens = told["tokens_per_forward"]
    return tokens / (tokens / told["tokens_per_second"] - told["host_ms_per_step"] / 1000)


def _where(result: dict[str, Any]) -> str:
    where = result["environment"]
    return (
        f"{where['base'].split('/')[-1]}, {where['dtype']}, {where['device']}, {where['threads']} threads, "
        f"torch {where['versions']['torch'].split('+')[0]}, transformers {where['versions']['transformers']}"
    )


def exactness() -> str:
    """What was compared with plain generate, and what came of it."""
    full, sampling, memory = load("specbench-float32")["runs"], load("distribution"), load("memory")
    host = load("host")
    told = ", ".join(f"{run['identical']} of {run['questions']} identical with {run['name']}" for run in full)
    gaps = [d["gap"] for run in full for d in run["divergences"]]
    ties = f"; the others part at logits {max(gaps):.1e} apart or less" if gaps else ""
    stages = {kind: host[kind]["milliseconds"]["host"] for kind in ("narrow", "smollm2")}
    half = {run["name"]: run for run in load("specbench-bfloat16")["runs"]}
    worst = max(d["gap"] for run in half.values() for d in run["divergences"])
    peaks = ", ".join(f"{kind} {100 * (r - 1):+.1f} %" for kind, r in memory["ratios"].items() if kind != "plain")
    asked, same = half["ppd packed"]["questions"], {name: run["identical"] for name, run in half.items()}
    return "\n".join(
        [
            "| what | measured |",
            "|---|---|",
            f"| greedy, float32, Spec-Bench | {told}{ties} |",
            f"| greedy, bfloat16, Spec-Bench | {same['ppd packed']} of {asked} identical with packed weights, "
            f"{same['ppd compiled']} compiled ({same['none compiled']} without any drafter); the others part where the "
            f"two best logits are {worst:.3f} apart or less |",
            _strict(),
            f"| sampling, {sampling['draws']:,} draws | total variation {sampling['total_variation']:.4f} to the exact "
            f"distribution; an exact sampler's noise is {sampling['expected_of_exact_sampler']:.4f} |",
            f"| host work at 64 rows | {stages['narrow']:.2f} ms a step of Python, numpy and dispatch (30 layers, tiny "
            f"width), all but the forward; {stages['smollm2']:.2f} ms with SmolLM2's logits and KV cache |",
            f"| peak memory of a generation | {peaks} over plain generate |",
            f"| adapter | {memory['adapter_parameters']:,} parameters, "
            f"{100 * memory['adapter_parameters'] / memory['base_parameters']:.4f} % of the base's |",
        ]
    )


def _strict() -> str:
    """What it takes to write the very tokens of `generate` in half precision."""
    ways = load("exactness-bfloat16")["ways"]
    as_it_is, ties, alone = (ways[way] for way in ("as it is", "near ties alone", "products and attention"))
    took = {way: told["seconds"] / told["tokens"] for way, told in ways.items()}
    longer = [took[way] / took["as it is"] for way in ("near ties alone", "products and attention")]
    return (
        f"| the same in short, 8 rows | {as_it_is['identical']:.0f} of {as_it_is['questions']:.0f} answers identical; "
        f"{ties['identical']:.0f} where near ties are decided by forwards of one row, {longer[0]:.2f} times the time; "
        f"{alone['identical']:.0f} where every row is computed as if alone, {longer[1]:.2f} times |"
    )


def render(name: str) -> str:
    """The table `name` as Markdown."""
    made = {
        "chart": chart, "composed": composed, "each": each, "pairs": pairs,
        "subsets": subsets, "sweep": sweep, "ablation": ablation, "training": training, "exactness": exactness,
    }  # fmt: skip
    return made[name]()


def between(name: str) -> tuple[str, str]:
    """The lines between which the table `name` stands."""
    return f"<!-- {name}: made by benchmarks/tables.py -->\n", f"<!-- end of {name} -->"


def main() -> None:
    for file, names in NAMES.items():
        text = file.read_text(encoding="utf-8")
        for name in names:
            begin, end = between(name)
            before, rest = text.split(begin)
            text = before + begin + render(name) + "\n" + end + rest.split(end)[1]
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
