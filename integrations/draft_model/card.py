"""The model card of a trained draft model: what it is for, how good it is, how it is loaded here and in vLLM.

Knows the card's text. Does not write files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppd_compose.card import accuracy_table, facts_list, relation

TEMPLATE = """---
{relation}library_name: transformers
pipeline_tag: text-generation
tags:
- speculative-decoding
- parallel-draft-model
- ppd_compose
---

# {draft}, drafting {tokens} tokens in one forward for {base}

A [parallel draft model](https://arxiv.org/abs/2504.18583): behind the text stands token {token} up to {prompts} times,
and at each of them the model guesses one token further ahead. Trained on the own replies of `{base}`.

```python
from ppd_compose import compose
from ppd_compose.integrations.draft_model import DraftModel

model = compose(base, DraftModel.from_pretrained("this folder or repository", depth={tokens}))
model.generate(**inputs, max_new_tokens=128)
```

In vLLM, for a base with a vocabulary of the same size:

```
vllm serve {base} --speculative-config \\
  '{{"method": "draft_model", "model": "this folder", "parallel_drafting": true, "num_speculative_tokens": {tokens}}}'
```

## Accuracy on held-out replies of the base

How often the best guess of the token that many places after the text was right.

{table}

## Training

{facts}
"""


def model_card(base: str, draft: str, token: int, accuracy: Sequence[float], facts: Mapping[str, Any]) -> str:
    """Markdown with the Hub's metadata on top; `accuracy` is by distance, the model's own next token first."""
    return TEMPLATE.format(
        relation=relation(draft),
        base=base or "the base",
        draft=draft,
        token=token,
        tokens=facts["tokens"],
        prompts=facts["tokens"] - 1,
        table=accuracy_table("tokens ahead", np.array(accuracy)[:, None]),
        facts=facts_list(facts),
    )
