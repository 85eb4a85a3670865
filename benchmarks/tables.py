"""The tables of README.md and RESULTS.md, made from `benchmarks/results/*.json`: run it to write them there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from speeds import chart, composed, each, load, pairs, speeds

ROOT = Path(__file__).parents[1]
README, MORE = ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md"
MEMORY = {
    "float32, AVX2": "memory-float32", "bfloat16, AVX2": "memory-kept",
    "bfloat16, AVX-512": "memory-kept-avx512", "the same, converted as it was loaded": "memory",
}  # fmt: skip
BEHIND = ("chart", "composed", "each", "pairs", "subsets", "sweep", "ablation", "training", "forwards")
NAMES = {README: ("speeds", "exactness", "memory"), MORE: BEHIND}


def memory() -> str:
    """Peak memory over that of plain generate, by dtype, machine and way of computing forwards."""
    ways = ("eager", "packed", "compiled", "regions")
    lines = ["| peak memory over `generate` | " + " | ".join(ways) + " |", "|---" * (len(ways) + 1) + "|"]
    for called, name in MEMORY.items():
        ratios = load(name)["ratios"]
        lines.append(f"| {called} | " + " | ".join(_more(ratios.get(way)) for way in ways) + " |")
    return "\n".join(lines)


def _more(ratio: float | None) -> str:
    return "" if ratio is None else f"{100 * (ratio - 1):+.0f} %"


def forwards() -> str:
    """Milliseconds of a verify forward by rows and context, as the base computes it and compiled."""
    points = load("latency")["points"]
    rows = sorted({point["rows"] for point in points})
    lines = ["| context | " + " | ".join(f"{n} row{'s' * (n > 1)}" for n in rows) + " |"]
    lines.append("|---" * (len(rows) + 1) + "|")
    for context in sorted({point["context"] for point in points}):
        taken = {point["rows"]: point["seconds"] for point in points if point["context"] == context}
        cells = [f"{1000 * taken[n]['eager']:.1f} / {1000 * taken[n]['compiled']:.1f}" for n in rows]
        lines.append(f"| {context} | {' | '.join(cells)} |")
    return "\n".join(lines)


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


def exactness() -> str:
    """What was compared with plain generate, and what came of it."""
    full, sampling, sizes = load("specbench-float32")["runs"], load("distribution"), load("memory")
    host = load("host")
    told = ", ".join(f"{run['identical']} of {run['questions']} identical with {run['name']}" for run in full)
    gaps = [d["gap"] for run in full for d in run["divergences"]]
    ties = f"; the others part at logits {max(gaps):.1e} apart or less" if gaps else ""
    stages = {kind: host[kind]["milliseconds"]["host"] for kind in ("narrow", "smollm2")}
    half = {run["name"]: run for run in load("specbench-bfloat16")["runs"]}
    worst = max(d["gap"] for run in half.values() for d in run["divergences"])
    asked, same = half["ppd packed"]["questions"], {name: run["identical"] for name, run in half.items()}
    return "\n".join(
        [
            "| what | measured |",
            "|---|---|",
            f"| greedy, float32, eager forwards, 60 Spec-Bench questions | {told}{ties} |",
            f"| greedy, bfloat16, the same questions | {same['ppd packed']} of {asked} identical with packed weights, "
            f"{same['ppd compiled']} compiled ({same['none compiled']} without any drafter); the others part where the "
            f"two best logits are {worst:.3f} apart or less |",
            _strict(),
            f"| sampling, {sampling['draws']:,} draws | total variation {sampling['total_variation']:.4f} to the exact "
            f"distribution; an exact sampler's noise is {sampling['expected_of_exact_sampler']:.4f} |",
            f"| host work at 64 rows | {stages['narrow']:.2f} ms a step of Python, numpy and dispatch (30 layers, tiny "
            f"width), all but the forward; {stages['smollm2']:.2f} ms with SmolLM2's logits and KV cache |",
            f"| adapter | {sizes['adapter_parameters']:,} parameters, "
            f"{100 * sizes['adapter_parameters'] / sizes['base_parameters']:.4f} % of the base's |",
        ]
    )


def _strict() -> str:
    """What it takes to write the very tokens of `generate` in half precision."""
    ways = load("exactness-bfloat16")["ways"]
    as_it_is, ties, alone = (ways[way] for way in ("as it is", "near ties alone", "products and attention"))
    took = {way: told["seconds"] / told["tokens"] for way, told in ways.items()}
    longer = [took[way] / took["as it is"] for way in ("near ties alone", "products and attention")]
    return (
        "| greedy, bfloat16, eager forwards, 24 questions, 48 tokens, 8 rows | "
        f"{as_it_is['identical']:.0f} of {as_it_is['questions']:.0f} identical; "
        f"{ties['identical']:.0f} where near ties are decided by forwards of one row, {longer[0]:.2f} times the time; "
        f"{alone['identical']:.0f} where every row is computed as if alone, {longer[1]:.2f} times |"
    )


def render(name: str) -> str:
    """The table `name` as Markdown."""
    made = {
        "chart": chart, "speeds": speeds, "composed": composed, "each": each, "pairs": pairs, "memory": memory,
        "subsets": subsets, "sweep": sweep, "ablation": ablation, "training": training, "exactness": exactness,
        "forwards": forwards,
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
