"""Which way to attend is fastest for a tree's rows below a long context? Seconds of all layers, by rows and context.

Ways are timed in turns, each over keys and values of as many layers as the shape has, so that no cache of the processor
holds them. Nothing of a model is computed but attention.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from shapes import SHAPES, base_of
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from ppd_compose.device import wait
from ppd_compose.environment import environment
from ppd_compose.lineage import ancestors
from ppd_compose.loading import DTYPES
from ppd_compose.storage import write_text

ROWS, CONTEXTS = (1, 8, 16, 32, 64), (128, 512, 1024, 2048, 4096)
console = Console(stderr=True)


class Given(NamedTuple):
    """What one layer attends to."""

    query: Tensor  # [1, heads, rows, head_dim]
    key: Tensor  # [1, key heads, context + rows, head_dim]
    value: Tensor  # as key
    see: Tensor  # bool [rows, rows], which of the rows a row sees beside all of the context
    mask: Tensor  # the same of all columns, bool [1, 1, rows, context + rows]

    @property
    def context(self) -> int:
        return self.key.shape[2] - self.query.shape[2]

    @property
    def groups(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    def below(self) -> Tensor:
        """The queries of a key head below one another `[1, key heads, groups * rows, head_dim]`."""
        return self.query.reshape(1, self.key.shape[1], -1, self.query.shape[3])


def repeated(given: Given) -> Tensor:
    """Keys and values copied for each query head, as transformers does with a mask."""
    key, value = (states.repeat_interleave(given.groups, dim=1) for states in (given.key, given.value))
    return scaled_dot_product_attention(given.query, key, value, attn_mask=given.mask)


def shared(given: Given) -> Tensor:
    """By torch's own way for keys that heads share."""
    return scaled_dot_product_attention(
        given.query, given.key, given.value, attn_mask=given.mask, enable_gqa=given.groups > 1
    )


def below(given: Given) -> Tensor:
    """The queries of a key head below one another, as verify forwards do."""
    mask = given.mask.repeat(1, 1, given.groups, 1)
    return scaled_dot_product_attention(given.below(), given.key, given.value, attn_mask=mask).reshape(
        given.query.shape
    )


def two_parts(given: Given) -> Tensor:
    """The context without a mask, the tree with one, and both put together by their sums of exponentials."""
    context, query = given.context, given.below()
    flash: Any = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        if query.device.type == "cpu"
        else torch.ops.aten._scaled_dot_product_flash_attention
    )
    far, far_sum = flash(query, given.key[:, :, :context], given.value[:, :, :context])[:2]
    scores = query @ given.key[:, :, context:].transpose(2, 3) * query.shape[3] ** -0.5
    scores = scores.float().masked_fill(~given.see.repeat(given.groups, 1), -torch.inf)
    near_sum = scores.logsumexp(-1)
    near = (scores - near_sum[..., None]).exp().to(query) @ given.value[:, :, context:]
    share = torch.sigmoid(far_sum - near_sum)[..., None]
    return (share * far + (1 - share) * near).to(query).reshape(given.query.shape)


def flex(given: Given, attend: Callable[..., Any] = flex_attention) -> Tensor:
    """By torch's flex attention, which makes a kernel of the rule who sees whom."""
    see, context = given.see, given.context

    def seen(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        own = see[row, (column - context).clamp(min=0)]
        return torch.where((column < context) | own, score, -torch.inf)

    out: Tensor = attend(given.query, given.key, given.value, score_mod=seen, enable_gqa=given.groups > 1)
    return out


WAYS: dict[str, Callable[[Given], Tensor]] = {
    "repeated": repeated, "shared": shared, "below": below, "two parts": two_parts, "flex": flex,
}  # fmt: skip


def layers_of(config: Any, context: int, rows: int, like: Tensor) -> list[Given]:
    """What all layers of a model of that configuration attend to: random numbers where `like` is and of its dtype."""
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    dim, columns = getattr(config, "head_dim", None) or config.hidden_size // heads, context + rows
    see = torch.from_numpy(ancestors(np.array([-1, *(i // 2 for i in range(rows - 1))]))).to(like.device)
    mask = torch.cat([see.new_ones(rows, context), see], dim=1)[None, None]
    torch.manual_seed(0)
    return [
        Given(
            like.new_empty(1, heads, rows, dim).normal_(),
            *like.new_empty(2, 1, key_heads, columns, dim).normal_(),
            see,
            mask,
        )
        for _ in range(config.num_hidden_layers)
    ]


def point(ways: dict[str, Callable[[Given], Tensor]], layers: Sequence[Given], rounds: int) -> dict[str, float]:
    """Median seconds of all `layers` by each way, in turns; two rounds warm up."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds + 2):
        for way, attend in ways.items():
            wait(layers[0].query.device)
            begin = time.perf_counter()
            for given in layers:
                attend(given)
            wait(layers[0].query.device)
            times[way].append(time.perf_counter() - begin)
    return {way: median(taken[2:]) for way, taken in times.items()}


def errors(ways: dict[str, Callable[[Given], Tensor]], given: Given) -> dict[str, float]:
    """How far each way is from attention in float32, at most."""
    exact = repeated(Given(*(states.float() for states in given[:3]), *given[3:]))
    return {way: float((attend(given).float() - exact).abs().max()) for way, attend in ways.items()}


@torch.no_grad()
def main(
    base: Annotated[str, typer.Option(help=f"Folder, Hub id, 'demo', or one of {', '.join(SHAPES)}.")] = "135m",
    rounds: int = 15,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "bfloat16",
    device: str = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result there.")] = None,
) -> None:
    """Print, as the last line, the result as JSON."""
    model, name = base_of(base, dtype, device)
    command = f"python benchmarks/attention.py --base {name} --rounds {rounds} --dtype {dtype} --device {device}"
    result: dict[str, Any] = {"environment": {**environment(model, command), "base": name}, "points": []}
    for context in track(CONTEXTS, "contexts", console=console):
        for rows in ROWS:
            torch.compiler.reset()  # one graph for all sizes does not compile on every device
            ways = {**WAYS, "flex": partial(flex, attend=torch.compile(flex_attention, dynamic=False))}
            layers = layers_of(model.config, context, rows, model.get_input_embeddings().weight)
            seconds = point(ways, layers, rounds)
            told = {"context": context, "rows": rows, "seconds": seconds, "errors": errors(ways, layers[0])}
            result["points"].append(told)
            if json_file:  # now already: who breaks it off has something
                write_text(json_file, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
