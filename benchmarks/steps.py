"""What does a composed step take on a base of any size? Guesses come true as often as told, so none is trained.

Prompt tokens of random numbers, recycling and lookup draft as ever, the forward verifies all of it, and which guesses
are accepted is drawn. Against plain `generate`, and against it with a static cache that transformers compiles.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from ppd_compose.integrations.lookup import PromptLookup
from ppd_compose.integrations.recycling import TokenRecycling
from shapes import SHAPES, base_of

from ppd_compose import PromptTokens, TokenTree, compose, hookimpl
from ppd_compose.ahead import record_ahead
from ppd_compose.bench_job import WAYS
from ppd_compose.device import wait
from ppd_compose.environment import environment
from ppd_compose.forward import records
from ppd_compose.storage import write_text

ROWS = [16, 64]


class DrawnAcceptance:
    """Plugin: a guess comes true with probability `rate`, whatever the model says; it is asked all the same."""

    name = "drawn-acceptance"

    def __init__(self, rate: float) -> None:
        self.rate, self.dice = rate, np.random.default_rng(0)

    @hookimpl(tryfirst=True)
    def accept(self, tree: TokenTree, pick: Any) -> Iterator[tuple[int, int]]:
        """Walk down the likeliest children for as long as the draw allows."""
        node: int | None = 0
        while node is not None:
            token, child = pick(node), None
            children = np.flatnonzero(tree.parents == node)
            if len(children) and self.dice.random() < self.rate:
                child = int(children[tree.log_probs[children].argmax()])
            yield node, token if child is None else int(tree.tokens[child])
            node = child


def composed(base: Any, way: str, rows: int, rate: float, longest: int) -> Any:
    """A composition of drafters that any base takes, which verifies up to `rows` rows at a time; sequences are of
    `longest` tokens at most."""
    hidden = base.config.get_text_config().hidden_size
    noise = 0.02 * torch.randn(3, 1, hidden, generator=torch.Generator().manual_seed(0))
    drafters = [PromptTokens(noise, [[0.3, 0.15, 0.1, 0.05]] * 3), TokenRecycling(), PromptLookup()]
    model = compose(base, *drafters, budget=rows, plugins=[DrawnAcceptance(rate)], **WAYS[way])
    model.warmup()
    if records(model):
        record_ahead(model, longest)
    return model


def timed(model: Any, ids: torch.Tensor, settings: dict[str, Any]) -> float:
    """Seconds of one generation."""
    wait(model.device)
    begin = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **settings)
    wait(model.device)
    return time.perf_counter() - begin


def computing(model: Any, ids: torch.Tensor, settings: dict[str, Any]) -> dict[str, float]:
    """The share of one generation in which a CUDA device computes; in the rest it waits for the host."""
    if model.device.type != "cuda":
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        seconds = timed(model, ids, settings)
    busy = sum(event.self_device_time_total for event in seen.key_averages()) / 1e6
    return {"device_share": busy / seconds}


def told_of(model: Any) -> dict[str, float]:
    """Of a composition's last generation."""
    stats = model.stats
    whole = stats.seconds["verify"] + stats.host_seconds
    return {
        "tokens_per_forward": stats.tokens_per_forward,
        "rows_per_forward": stats.rows_per_forward,
        "verify_ms_per_step": 1000 * stats.seconds["verify"] / stats.forwards,
        "host_ms_per_step": 1000 * stats.host_seconds / stats.forwards,
        "host_share": stats.host_seconds / whole,
    }


def contenders_of(
    base: Any, ways: list[str], rows: list[int], rate: float, prompt: int, tokens: int, static: bool
) -> dict[str, tuple[Any, dict[str, Any]]]:
    """By name what generates, and with which settings."""
    length = {"max_new_tokens": tokens}
    made: dict[str, tuple[Any, dict[str, Any]]] = {"generate": (base, length)}
    if static:
        made["generate static"] = (base, {**length, "cache_implementation": "static"})
    for way in ways:
        for n in rows:
            made[f"composed {way} {n}"] = (composed(base, way, n, rate, prompt + tokens), length)
    return made


def main(
    base: Annotated[str, typer.Option(help=f"{', '.join(SHAPES)}, or a folder, a Hub id, 'demo'.")] = "tiny",
    rows: Annotated[list[int] | None, typer.Option(help="Rows of a verify forward. Repeatable.")] = None,
    ways: Annotated[str, typer.Option(help="eager, packed, compiled, joined by '+'.")] = "eager+compiled",
    rate: Annotated[float, typer.Option(help="Chance of each guess; tokens a forward are 1 / (1 - rate).")] = 0.6,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 512,
    tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 128,
    rounds: int = 3,
    static: Annotated[bool, typer.Option(help="Also generate with a static cache.")] = True,
    dtype: str = "bfloat16",
    device: str = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result there.")] = None,
) -> None:
    """Print, as the last line, the result as JSON."""
    model, name = base_of(base, dtype, device)
    model.generation_config.eos_token_id = None  # every answer has its full length
    words = model.config.get_text_config().vocab_size
    ids = torch.randint(5, words, (1, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    contenders = contenders_of(model, ways.split("+"), rows or ROWS, rate, prompt, tokens, static)
    seconds = {
        label: [timed(who, ids, settings)] for label, (who, settings) in contenders.items()
    }  # the first warms up
    sizes = " ".join(f"--rows {n}" for n in rows or ROWS)
    command = (
        f"python benchmarks/steps.py --base {name} {sizes} --ways {ways} --rate {rate} --prompt {prompt} "
        f"--tokens {tokens} --rounds {rounds}{'' if static else ' --no-static'} --dtype {dtype} --device {device}"
    )
    result: dict[str, Any] = {"environment": {**environment(model, command), "base": name}}
    for done in range(1, rounds + 1):
        for label, (who, settings) in contenders.items():
            seconds[label].append(timed(who, ids, settings))
        typical = {label: median(taken[1:]) for label, taken in seconds.items()}
        result |= {"rounds": done, "contenders": {
            label: {
                "tokens_per_second": tokens / typical[label],
                "speedup": typical["generate"] / typical[label],
                **(told_of(who) if label.startswith("composed") else {}),
            }
            for label, (who, _) in contenders.items()
        }}  # fmt: skip
        if json_file:  # now already: who breaks it off has something
            write_text(json_file, json.dumps(result, indent=1) + "\n")
    for label, (who, settings) in contenders.items():
        result["contenders"][label] |= computing(who, ids, settings)
    if json_file:
        write_text(json_file, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
