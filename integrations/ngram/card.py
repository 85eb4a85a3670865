"""The model card of an n-gram table: what it is for, how it was made, how good it is.

Knows the card's text. Does not write files.
"""

from __future__ import annotations

import numpy as np

from ppd_compose.card import accuracy_table, facts_list, relation

from .drafter import NGramTable

TEMPLATE = """---
{relation}library_name: ppd_compose
tags:
- speculative-decoding
- ppd_compose
---

# An n-gram table for {base}

What `{base}` tends to say after its last {order} tokens: {entries:,} chances after {contexts:,} contexts, counted in
its own replies. It guesses the next tokens without any forward. The base's weights and its output stay as they are.

```python
from ppd_compose import compose
from ppd_compose.integrations.ngram import NGramTable

model = compose(base, NGramTable.from_pretrained("this folder or repository"), "recycling", "lookup")
model.generate(**inputs, max_new_tokens=128)
```

## Accuracy on held-out replies of the base

How often the next token was the guess of that rank or a better one.

{table}

## Training

{facts}

The table belongs to the weights with embedding fingerprint `{fingerprint}`; with others of the same tokenizer the
tokens are the base's own too, but fewer guesses may be right.
"""


def model_card(made: NGramTable) -> str:
    """Markdown with the Hub's metadata on top. Raises `ValueError` for a table that names no base or no accuracies."""
    if made.identity is None or not made.accuracy:
        raise ValueError("a card names the base and the accuracies: give the table identity and accuracy")
    return TEMPLATE.format(
        relation=relation(made.identity.name),
        base=made.identity.name or "a base without a name",
        order=made.table.order,
        entries=len(made.table.tokens),
        contexts=len(made.table.contexts),
        table=accuracy_table("distance", np.asarray([made.accuracy])),
        facts=facts_list(made.training),
        fingerprint=made.identity.fingerprint,
    )
