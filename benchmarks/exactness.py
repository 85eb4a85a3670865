"""What stands between half precision and the very tokens of generate, and what it costs to remove it.

A forward of several rows rounds otherwise than forwards of one: some products add in another order, and attention adds
in an order that depends on how many columns a row is given. Here both are computed as if every row were alone; or all
is left as it is, and only rows whose two best logits are close are computed once more, by a forward of one row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AttentionInterface, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ppd_compose import TokenTree, compose, decode
from ppd_compose.bench import greedy
from ppd_compose.cli import drafters_of
from ppd_compose.environment import environment
from ppd_compose.grouped import BORROWED
from ppd_compose.loading import load_base
from ppd_compose.prompts import read_prompts
from ppd_compose.questions import Question, questions_from
from ppd_compose.verify import verify

TRIED = 256  # rows by which a product's order is found out
AS_IT_IS, NEAR_TIES, PRODUCTS, ALL = WAYS = ("as it is", "near ties alone", "products alone", "products and attention")


def by_columns(rows: Tensor, layer: nn.Linear) -> Tensor:
    """The product of `rows` `[rows, in]` laid out column by column, which oneDNN adds in the order of a lone row."""
    return linear(rows.t().contiguous().t(), layer.weight, layer.bias)


def one_by_one(rows: Tensor, layer: nn.Linear) -> Tensor:
    """The product row by row."""
    return torch.cat([linear(row, layer.weight, layer.bias) for row in rows.split(1)])


def products(model: nn.Module) -> dict[nn.Linear, Callable[[Tensor, nn.Linear], Tensor]]:
    """The layers whose products of several rows are not those of each row, and a way that is exact."""
    found = {}
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            rows = torch.randn(TRIED, layer.in_features, generator=torch.Generator().manual_seed(0)).to(layer.weight)
            alone = one_by_one(rows, layer)
            ways = [lambda x, it: linear(x, it.weight, it.bias), by_columns, one_by_one]
            exact = next(
                way for way in ways
                if all(torch.equal(torch.cat([way(x, layer) for x in rows.split(n)]), alone) for n in (2, 4, 8, 16, 32))
            )  # fmt: skip
            if exact is not ways[0]:
                found[layer] = exact
    return found


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """Each row by itself over the columns that it sees, from the first one on, without padding between: those of this
    forward are put in a row at the end for it."""
    sdpa: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if mask is None:
        return sdpa(module, query, key, value, None, **kwargs)
    rows = query.shape[2]
    before = key.shape[2] - rows
    keys, values = key[:, :, before:].clone(), value[:, :, before:].clone()
    told = []
    for row in range(rows):
        seen = mask[0, 0, row, before:].nonzero()[:, 0]
        first, end = int(mask[0, 0, row].int().argmax()), before + len(seen)
        key[:, :, before:end], value[:, :, before:end] = keys[:, :, seen], values[:, :, seen]
        mine = query[:, :, row : row + 1], key[:, :, first:end], value[:, :, first:end]
        told.append(sdpa(module, *mine, None, **kwargs)[0])
    key[:, :, before:], value[:, :, before:] = keys, values
    return torch.cat(told, 1), None


@dataclass
class NearTies:
    """Verify forwards whose nodes on the path are decided by a forward of one row where the two best logits are close.

    Attributes:
        gap: largest difference of two logits that are called close.
        forwards: of one row, so far.
    """

    gap: float
    forwards: int = 0

    def __call__(self, forward: Any, cache: Any, context: Any, tree: Any, *args: Any, **kwargs: Any) -> Any:
        """As `verify`."""
        verified = verify(forward, cache, context, tree, *args, **kwargs)
        path: list[int] = []
        node: int | None = 0
        while node is not None:
            best, second = verified.logits[node].float().topk(2).values
            if len(tree) > 1 and best - second <= self.gap:
                verified.logits[node] = self.alone(forward, cache, context, tree, [*path, node])
            path.append(node)
            node = tree.child(node, int(verified.logits[node].argmax()))
        return verified

    def alone(self, forward: Any, cache: Any, context: Any, tree: Any, path: list[int]) -> Tensor:
        """Logits after the last node of `path`, over the keys and values of the others, which stay as they are."""
        front = cache.layers[0].extent.front  # columns that prompt tokens alone see
        before = front + context.length
        columns = [*range(front, before), *(before + node for node in path[:-1])]
        layers = [(layer.keys[:, :, columns], layer.values[:, :, columns]) for layer in cache.layers]
        root = TokenTree.chain(tree.tokens[path[-1]])
        own = verify(forward, DynamicCache(layers), context.behind(()).grown(len(path) - 1), root, [], {})
        self.forwards += 1
        return own.logits[0]


@contextmanager
def as_alone(way: str, exact: dict[nn.Linear, Any], ties: NearTies) -> Iterator[None]:
    """Verify forwards are computed `way`; prefills as ever."""
    ours, verifying = ALL_ATTENTION_FUNCTIONS[BORROWED], []
    how: Callable[..., Any] = ties if way == NEAR_TIES else verify
    plain = nn.Linear.forward

    def product(layer: nn.Linear, rows: Tensor) -> Tensor:
        if not verifying or layer not in exact or rows.shape[-2] == 1:
            return plain(layer, rows)
        return exact[layer](rows.flatten(0, -2), layer).view(*rows.shape[:-1], -1)

    def noted(*args: Any, **kwargs: Any) -> Any:
        verifying.append(True)
        try:
            return how(*args, **kwargs)
        finally:
            verifying.clear()

    if way in (PRODUCTS, ALL):
        nn.Linear.forward = product  # type: ignore[method-assign]
    if way == ALL:
        AttentionInterface.register(BORROWED, attention)
    decode.verify = noted
    try:
        yield
    finally:
        decode.verify, nn.Linear.forward = verify, plain  # type: ignore[method-assign]
        AttentionInterface.register(BORROWED, ours)


def answered(model: Any, question: Question, tokens: int, expected: list[int], told: dict[str, float]) -> None:
    """Decode one answer and add to what is told of its way."""
    told["identical"] += greedy(model, question.ids, tokens) == expected
    told["questions"] += 1
    told["seconds"] += sum(model.stats.seconds.values()) - model.stats.seconds["prefill"]
    told["verify_seconds"] += model.stats.seconds["verify"]
    told["forwards"] += model.stats.forwards - 1
    told["tokens"] += model.stats.tokens


def main(
    questions: Annotated[Path, typer.Option(help="JSON lines, as of Spec-Bench.")],
    drafters: Annotated[str, typer.Option(help="Names joined by '+'.")] = "ppd+recycling+lookup",
    per_category: int = 10,
    tokens: int = 128,
    rows: Annotated[int, typer.Option(help="Most rows of a forward.")] = 8,
    gap: Annotated[float, typer.Option(help="Largest difference of two logits that is called a near tie.")] = 0.5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result there.")] = None,
) -> None:
    """Print, as the last line, the result as JSON."""
    loaded = load_base("demo", "bfloat16")
    asked = questions_from(read_prompts(questions), loaded.tokenizer, per_category)
    exact = products(loaded.model)
    models = {way: compose(loaded.model, *drafters_of(drafters), budget=rows) for way in WAYS}
    counted = ("identical", "questions", "seconds", "verify_seconds", "forwards", "tokens")
    told, ties = {way: dict.fromkeys(counted, 0.0) for way in WAYS}, NearTies(gap)
    for question in track(asked, "questions"):
        expected = greedy(loaded.model, question.ids, tokens)
        for way, model in models.items():
            with as_alone(way, exact, ties):
                answered(model, question, tokens, expected, told[way])
    told[NEAR_TIES]["alone"] = ties.forwards
    names = {name for name, layer in loaded.model.named_modules() if layer in exact}
    command = (
        f"python benchmarks/exactness.py --questions {questions.name} --drafters {drafters} --per-category "
        f"{per_category} --tokens {tokens} --rows {rows} --gap {gap:g}"
    )
    result = {
        "environment": environment(loaded.model, command),
        "other_order": sorted({name.rpartition(".")[2] for name in names}),
        "ways": told,
    }
    if json_file:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
