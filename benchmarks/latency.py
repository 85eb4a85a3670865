"""What does a verify forward cost? Seconds by rows and context, computed as the base does it, packed and compiled.

All three in turns at every point, so that a drift of the machine meets all alike. The floor is what the machine needs
to read weights and cache once, by the bandwidth of a large copy.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from shapes import SHAPES, base_of
from transformers import Cache, DynamicCache

from ppd_compose import TokenTree, compose
from ppd_compose.bench_job import WAYS
from ppd_compose.cache import commit, recording, with_cache
from ppd_compose.device import wait
from ppd_compose.environment import environment
from ppd_compose.forward import forward_of
from ppd_compose.loading import DTYPES
from ppd_compose.storage import write_text
from ppd_compose.verify import Context, verify

ROWS = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (128, 512, 1024, 2048, 4096)


@contextmanager
def filled(model: Any, context: int) -> Iterator[Cache]:
    """A cache of `context` tokens of no meaning, as it is after a step."""
    cache = DynamicCache(config=model.config)
    ids = torch.arange(context, device=model.device)[None] % 400 + 5
    model(input_ids=ids, **with_cache(model, cache), logits_to_keep=1)
    with recording(cache), forward_of(model).laid_out(cache, torch.ones(context, dtype=torch.bool)):
        yield cache


def timed(model: Any, cache: Cache, context: int, tree: TokenTree) -> float:
    """Seconds of one forward below `cache`, which is as it was after it."""
    forward, seen = forward_of(model), Context.of(torch.ones(context, dtype=torch.bool, device=model.device))
    wait(model.device)
    begin = time.perf_counter()
    verified = verify(forward, cache, seen, tree, (), {})
    seconds = time.perf_counter() - begin
    commit(cache, verified.rows, [])
    return seconds


def bandwidth(model: Any, megabytes: int = 256) -> float:
    """Bytes that the device of `model` reads and writes in a second, the best of several large copies."""
    whole = torch.ones(megabytes * 2**20, dtype=torch.uint8, device=model.device)
    other, taken = torch.empty_like(whole), []
    for _ in range(8):
        wait(model.device)
        begin = time.perf_counter()
        other.copy_(whole)
        wait(model.device)
        taken.append(time.perf_counter() - begin)
    return 2 * whole.nbytes / min(taken)


def bytes_read(model: Any, cache: Any) -> int:
    """Of all weights that a forward multiplies with, and of `cache`."""
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    weights = sum(weight.nbytes for weight in model.parameters()) - (0 if inputs is outputs else inputs.nbytes)
    columns = slice(cache.get_seq_length())
    held = [states[:, :, columns] for layer in cache.layers for states in (layer.keys, layer.values)]
    return weights + sum(states.nbytes for states in held)


@torch.no_grad()
def curves(
    models: dict[str, Any], contexts: Sequence[int], rows: Sequence[int], rounds: int
) -> Iterator[dict[str, Any]]:
    """Median seconds of each way at each context and number of rows."""
    speed = bandwidth(next(iter(models.values())))
    for context in track(contexts, "contexts"):
        with ExitStack() as held:
            caches = {way: held.enter_context(filled(model, context)) for way, model in models.items()}
            for n in rows:
                yield point(models, caches, context, n, rounds, speed)


def point(
    models: dict[str, Any], caches: dict[str, Cache], context: int, rows: int, rounds: int, speed: float
) -> dict[str, Any]:
    """Median seconds of a forward of `rows` rows by each way; the first round warms up."""
    tree = TokenTree.of(list(range(10, 10 + rows)), [-1, *(i // 2 for i in range(rows - 1))], [0.0] * rows)
    times: dict[str, list[float]] = {way: [] for way in models}
    for _ in range(rounds + 1):
        for way, model in models.items():
            times[way].append(timed(model, caches[way], context, tree))
    seconds = {way: median(taken[1:]) for way, taken in times.items()}
    floor = bytes_read(next(iter(models.values())), next(iter(caches.values()))) / speed
    return {"context": context, "rows": rows, "seconds": seconds, "floor_seconds": floor}


def main(
    ways: Annotated[str, typer.Option(help="Joined by '+'.")] = "eager+packed+compiled",
    contexts: Annotated[list[int] | None, typer.Option("--context", help="Cached tokens. Repeatable.")] = None,
    rounds: int = 9,
    base: Annotated[
        str, typer.Option(help=f"Folder, Hub id, 'demo', or of random weights: {', '.join(SHAPES)}.")
    ] = "demo",
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "bfloat16",
    device: str = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result there.")] = None,
) -> None:
    """Print, as the last line, the result as JSON."""
    model, name = base_of(base, dtype, device)
    models = {way: compose(model, budget=64, **WAYS[way]) for way in ways.split("+")}
    begin = time.perf_counter()
    for made in models.values():
        made.warmup()
    warm = time.perf_counter() - begin
    command = (
        f"python benchmarks/latency.py --ways {ways} {' '.join(f'--context {n}' for n in contexts or CONTEXTS)} "
        f"--rounds {rounds} --base {name} --dtype {dtype} --device {device}"
    )
    result: dict[str, Any] = {
        "environment": {**environment(model, command), "base": name}, "warmup_seconds": warm, "points": [],
    }  # fmt: skip
    for measured in curves(models, contexts or CONTEXTS, ROWS, rounds):
        result["points"].append(measured)
        if json_file:  # now already: who breaks it off has something
            write_text(json_file, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
