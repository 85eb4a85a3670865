"""All that is to be measured on a GPU, in ten minutes: forwards and their floor, steps of any size, tokens a second.

Each part is a benchmark of its own in a process of its own, with a share of the time; what one has measured when that
is over lies beside the results as `*.partial.json`, of tokens a second as `*.part`. Parts whose result lies in the
folder already are left out, so a run that was cut off goes on. Models are compiled by regions, which takes a third of
the time. Without network SmolLM2 is given as a folder; `--base 135m`, its shape with random weights, leaves out tokens
a second.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from shapes import SHAPES

HERE = Path(__file__).parent
EVERY = "ppd+medusa+eagle+ngram+recycling+lookup"
SETTINGS = {
    # Else torch hands attention to cuDNN first, from Hopper on, which plans anew for every length, of `generate` too.
    "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
    # A forward that cannot be recorded, of which these warn, is not to be taken for one that is.
    "PYTHONWARNINGS": "error:::ppd_compose.recorded,error:::ppd_compose.replayed",
}
console = Console(stderr=True)


def parts(base: str, shapes: list[str], device: str, dtype: str) -> Iterator[tuple[str, float, list[str]]]:
    """Name, share of the time and command of each part."""
    where, ways = ["--device", device, "--dtype", dtype], ["--ways", "eager+regions"]
    few = ["--context", "128", "--context", "1024", "--rounds", "5"]
    composed = [word for listing in ("ppd", "ppd+ngram+recycling+lookup", EVERY) for word in ("--drafters", listing)]
    brief = ["--per-category", "2", "--tokens", "64", "--rounds", "2", "--peer", "transformers static"]
    speeds = 0.0 if base in SHAPES else 0.35  # what random weights write says nothing
    if speeds:
        yield "throughput", speeds, ["throughput.py", *brief, "--ways", "regions", *composed, "--base", base, *where]
    share = (1 - speeds) / (2 + 3 * len(shapes))  # a larger base takes half as long again
    for label, size in {"base": base, **{shape: shape for shape in shapes}}.items():
        mine = share if label == "base" else 1.5 * share
        yield f"latency-{label}", mine, ["latency.py", *ways, "--base", size, *few, *where]
        few_steps = ["--rounds", "3"] if label == "base" else ["--rounds", "1", "--rows", "16", "--no-static"]
        yield f"steps-{label}", mine, ["steps.py", *ways, "--base", size, *few_steps, *where]


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results, made when it is not there.")],
    base: Annotated[str, typer.Option(help="SmolLM2-135M-Instruct: a folder, a Hub id, or 'demo'.")] = "demo",
    shapes: Annotated[str, typer.Option(help=f"Of random weights: {', '.join(SHAPES)}; joined by '+'.")] = "1b+7b",
    minutes: Annotated[float, typer.Option(help="For everything.")] = 9.0,
    device: str = "cuda",
    dtype: str = "bfloat16",
) -> None:
    """Run every part that has no result yet; end with 1 when one of them gave none."""
    out.mkdir(parents=True, exist_ok=True)
    missing = []
    for name, share, (script, *options) in parts(base, shapes.split("+"), device, dtype):
        result = out / f"{name}.json"
        if result.exists():
            continue
        command = [sys.executable, str(HERE / script), *options, "--json", str(result)]
        console.print(f"{name}: {script} {' '.join(options)}", highlight=False)
        try:
            subprocess.run(
                command, check=True, stdout=subprocess.DEVNULL, timeout=60 * minutes * share,
                env={**os.environ, **SETTINGS},
            )  # fmt: skip
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            missing.append(name)
            if part := result.exists():
                result.replace(result.with_suffix(".partial.json"))
            gave = "a part of its result" if part else "no result"
            console.print(f"[yellow]{name} gave {gave}:[/] {type(error).__name__}", highlight=False)
    if missing:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
