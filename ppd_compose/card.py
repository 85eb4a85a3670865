"""The model card of an adapter: what it is for, how it was made, how good it is, how it is loaded.

Knows the card's text, and the parts that cards of all drafters have. Does not write files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .prompt import PromptTokens
from .tree import Floats

TEMPLATE = """---
base_model: {base}
library_name: ppd_compose
tags:
- parallel-prompt-decoding
- speculative-decoding
- ppd_compose
---

# Prompt tokens for {base}

{n} trained prompt token(s) of {v} embedding(s) each ({parameters:,} parameters) that let
[Parallel Prompt Decoding](https://arxiv.org/abs/2405.18628) guess the next tokens of `{base}` in its own forward.
The base's weights and its output stay as they are.

```python
from ppd_compose import PromptTokens, compose

model = compose(base, PromptTokens.from_pretrained("this folder or repository"))
model.generate(**inputs, max_new_tokens=128)
```

Needs `import ppd_compose`; without it PEFT stops at `KeyError: 'PPD'`.

## Accuracy on held-out replies of the base

How often the token at a distance was the guess of that rank or a better one.

{table}

## Training

{facts}

The prompt tokens belong to the weights with embedding fingerprint `{fingerprint}`; with other weights of the same
shapes they still give the base's own tokens, but fewer guesses may be right.
"""


def model_card(prompt: PromptTokens, facts: Mapping[str, Any]) -> str:
    """Markdown with the Hub's metadata on top."""
    if prompt.identity is None:
        raise ValueError("a card names the base: give the prompt tokens an identity")
    n, v, _ = prompt.embeddings.shape
    return TEMPLATE.format(
        base=prompt.identity.name,
        n=n,
        v=v,
        parameters=prompt.embeddings.numel(),
        table=accuracy_table("distance", prompt.accuracy),
        facts=facts_list(facts),
        fingerprint=prompt.identity.fingerprint,
    )


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
