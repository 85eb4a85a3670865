"""The model card of trained Medusa heads: what they are for, how they were made, how good they are.

Knows the card's text. Does not write files.
"""

from __future__ import annotations

import numpy as np

from ppd_compose.card import accuracy_table, facts_list, relation

from .drafter import MedusaHeads

TEMPLATE = """---
{relation}library_name: ppd_compose
tags:
- medusa
- speculative-decoding
- ppd_compose
---

# Medusa heads for {base}

{heads} [Medusa](https://arxiv.org/abs/2401.10774) head(s) of {layers} residual block(s) each ({parameters:,}
parameters) that guess the next tokens of `{base}` from its last hidden state. They use the base's own
output head, {entries}. The base's weights and its output stay as they are.

```python
from ppd_compose import compose
from ppd_compose.integrations.medusa import MedusaHeads

model = compose(base, MedusaHeads.from_pretrained("this folder or repository"))
model.generate(**inputs, max_new_tokens=128)
```

## Accuracy on held-out replies of the base

How often the token at a distance was the guess of that rank or a better one.

{table}
{calibrated}{beside}
## Training

{facts}

The heads belong to the weights with embedding fingerprint `{fingerprint}`; with other weights of the same shapes they
still give the base's own tokens, but fewer guesses may be right.
"""

BESIDE = """
## Composed with prompt tokens

{count} more heads read the prompt tokens with digest `{digest}` where these are composed too, the last accepted token's
hidden state and the token after it, and tell better what the prompt tokens say:

{table}

{facts}
"""


def model_card(made: MedusaHeads) -> str:
    """Markdown with the Hub's metadata on top. Raises `ValueError` for heads that name no base."""
    if made.identity is None:
        raise ValueError("a card names the base: give the heads an identity")
    heads = made.heads
    bias = 0 if heads.bias is None else heads.bias.numel()
    return TEMPLATE.format(
        relation=relation(made.identity.name),
        base=made.identity.name or "a base without a name",
        heads=len(heads),
        layers=heads.weight.shape[1],
        parameters=heads.weight.numel() + bias,
        entries="all of it" if heads.token_map is None else f"of it the rows of {heads.entries:,} frequent tokens",
        table="Not measured." if made.accuracy is None else accuracy_table("head", made.accuracy),
        calibrated=_calibrated(made),
        beside=_beside(made),
        facts=facts_list(made.training) or "Not told.",
        fingerprint=made.identity.fingerprint,
    )


def _calibrated(made: MedusaHeads) -> str:
    if made.calibration is None:
        return ""
    pairs = ", ".join(f"{offset:.2f} and {slope:.2f}" for offset, slope in made.calibration.tolist())
    return f"\nBy held-out replies the odds that a head gives are moved by an offset and a slope: {pairs}.\n"


def _beside(made: MedusaHeads) -> str:
    """What is told of heads that read prompt tokens."""
    heads = made.prompt_heads
    if heads is None:
        return ""
    facts = facts_list(heads.facts["training"])
    table = accuracy_table("distance", np.asarray(heads.facts["accuracy"]))
    return BESIDE.format(count=len(heads), digest=heads.prompt_tokens, table=table, facts=facts)
