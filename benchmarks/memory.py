"""How much more memory does composing need? Peak resident memory of a generation, plain and composed, and seconds until
ready.

Each is measured in a process of its own, after the model is loaded and the peak was reset (Linux).
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.progress import track

from ppd_compose import compose
from ppd_compose.bench_job import WAYS
from ppd_compose.cli import QUESTION
from ppd_compose.drafters import load_drafter
from ppd_compose.environment import environment
from ppd_compose.loading import load_base
from ppd_compose.prompts import encode

app = typer.Typer()


@app.command()
def peak(kind: str, base: str, dtype: str, max_new_tokens: int) -> None:
    """Print the seconds of a warm-up and the peak of one generation in KiB; `kind` is "plain" or how the forwards of a
    composition are computed."""
    loaded = load_base(base, dtype)
    model, begin = loaded.model, time.perf_counter()
    if kind != "plain":
        model = compose(model, load_drafter("ppd"), **WAYS[kind])
        model.warmup()
    ready = time.perf_counter() - begin
    ids = torch.tensor([encode(loaded.tokenizer, QUESTION)])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens)
    lines = Path("/proc/self/status").read_text().splitlines()
    print(f"{ready:.2f}", next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")))


@app.command()
def compare(
    base: Annotated[str, typer.Option(help="A folder, a Hub id, or 'demo'.")] = "demo",
    dtype: str = "bfloat16",
    max_new_tokens: int = 256,
    ways: Annotated[str, typer.Option(help="eager, packed, compiled, joined by '+'.")] = "eager",
    rounds: Annotated[int, typer.Option(help="Processes of each kind, in turns.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result there.")] = None,
) -> None:
    """Print the ratios of median peaks, and as the last line the result as JSON."""
    kinds = ("plain", *ways.split("+"))
    peaks: dict[str, list[int]] = {kind: [] for kind in kinds}
    ready: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in track(range(rounds)):
        for kind in kinds:
            command = [sys.executable, __file__, "peak", kind, base, dtype, str(max_new_tokens)]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            ready[kind].append(float(told[-2]))
            peaks[kind].append(int(told[-1]))
    model, tokens = load_base(base, dtype).model, load_drafter("ppd")
    command_line = (
        f"python benchmarks/memory.py compare --base {base} --dtype {dtype} --ways {ways} "
        f"--max-new-tokens {max_new_tokens}"
    )
    result = {
        "environment": environment(model, command_line),
        "peak_kib": peaks,
        "ready_after_s": ready,  # packing, compiling, measuring the budget: less where an earlier process did so
        "ratios": {kind: median(seen) / median(peaks["plain"]) for kind, seen in peaks.items()},
        "adapter_parameters": sum(held.numel() for held in (tokens.embeddings, tokens.keys_values) if held is not None),
        "base_parameters": model.num_parameters(),
    }
    if json_file:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    app()
