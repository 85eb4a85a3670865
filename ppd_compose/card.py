"""The model card of an adapter: what it is for, how it was made, how good it is, how it is loaded.

Knows the card's text, and the parts that cards of all drafters have. Does not write files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from .adapter import Adapter
from .tree import Floats

TEMPLATE = """---
{relation}library_name: ppd_compose
pipeline_tag: text-generation
tags:
- peft
- parallel-prompt-decoding
- speculative-decoding
- ppd_compose
---

# Prompt tokens for {base}

{n} trained prompt token(s) of {v} embedding(s) each{prefix} ({parameters:,} parameters) that let
[Parallel Prompt Decoding](https://arxiv.org/abs/2405.18628) guess the next tokens of `{base}` in its own forward.
The base's weights and its output stay as they are.

```python
from ppd_compose import PromptTokens, compose

model = compose(base, PromptTokens.from_pretrained("this folder or repository"))
model.generate(**inputs, max_new_tokens=128)
```

Loads in PEFT too, as an adapter of its own kind, after `import ppd_compose`; without that import PEFT stops at
`KeyError: 'PPD'`.

## Accuracy on held-out replies of the base

How often the token at a distance was the guess of that rank or a better one.

{table}

{speed}## Training

{facts}

The prompt tokens belong to the weights with embedding fingerprint `{fingerprint}`; with other weights of the same
shapes they still give the base's own tokens, but fewer guesses may be right.
"""


def model_card(adapter: Adapter, results: Sequence[Mapping[str, Any]] = ()) -> str:
    """Markdown with the Hub's metadata on top.

    Args:
        adapter: prompt tokens that name their base.
        results: of `ppd-compose bench`, told as speed-ups.

    Raises `ValueError` when they name none.
    """
    if adapter.identity is None:
        raise ValueError("a card names the base: give the prompt tokens an identity")
    n, v, _ = adapter.embeddings.shape
    name = adapter.identity.name or "a base without a name"
    accuracy = accuracy_table("distance", np.asarray(adapter.accuracy)) if adapter.accuracy else "Not measured."
    return TEMPLATE.format(
        base=name,
        relation=relation(adapter.identity.name, "adapter"),
        n=n,
        v=v,
        prefix="" if adapter.prefix is None else f", with keys and values of their own in {len(adapter.prefix)} layers",
        parameters=sum(held.numel() for held in (adapter.embeddings, adapter.prefix) if held is not None),
        table=accuracy,
        speed="".join(map(speed_table, results)),
        facts=facts_list(adapter.training) or "Not told.",
        fingerprint=adapter.identity.fingerprint,
    )


def relation(base: str, kind: str = "") -> str:
    """The metadata that names the base, with a line end; nothing where `base` is no name that the Hub takes."""
    try:
        validate_repo_id(base)
    except HFValidationError:
        return ""
    return f"base_model: {json.dumps(base)}\n" + (f"base_model_relation: {kind}\n" if kind else "")


def speed_table(result: Mapping[str, Any]) -> str:
    """A section with the speed-ups over plain generate that a benchmark found."""
    where, runs = result["environment"], result["runs"]
    lines = [
        f"## Speed over plain generate, {where['device']}, {where['dtype']}",
        "",
        f"{result['base']['questions']} questions, greedy; `{where['command']}`.",
        "",
        "| category | " + " | ".join(run["name"] for run in runs) + " |",
        "|---" * (len(runs) + 1) + "|",
    ]
    for category in result["base"]["by_category"]:
        lines.append(f"| {category} | " + _speeds([run["by_category"][category] for run in runs]) + " |")
    return "\n".join([*lines, f"| all | {_speeds(runs)} |", "", ""])


def _speeds(told: Sequence[Mapping[str, Any]]) -> str:
    return " | ".join(f"{each['speedup']:.2f}x" for each in told)


def accuracy_table(first: str, accuracy: Floats) -> str:
    """Rows of `accuracy` `[rows, rank]`, how often the guess of that rank was right, cumulated over the ranks."""
    within = accuracy.cumsum(axis=1)
    ranks = [k for k in (1, 2, 3, 5, 10) if k <= within.shape[1]]
    lines = [f"| {first} | " + " | ".join(f"top {k}" for k in ranks) + " |", "|---" * (len(ranks) + 1) + "|"]
    for number, row in enumerate(within, 1):
        lines.append(f"| {number} | " + " | ".join(f"{row[k - 1]:.3f}" for k in ranks) + " |")
    return "\n".join(lines)


def facts_list(facts: Mapping[str, Any]) -> str:
    """What is known of a training, an entry a line; empty texts are left out."""
    return "\n".join(f"- {name.replace('_', ' ')}: {_plain(value)}" for name, value in facts.items() if value != "")


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {entry}" for name, entry in value.items())
    return f"`{value}`" if isinstance(value, str) and " --" in value else str(value)
