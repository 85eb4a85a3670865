"""The model card of an EAGLE head: what it is for, how it was made, how good it is, how it is loaded.

Knows the card's text. Does not write files.
"""

from __future__ import annotations

import numpy as np

from ppd_compose.card import accuracy_table, facts_list, relation

from .head import Head

TEMPLATE = """---
{relation}library_name: ppd_compose
tags:
- eagle
- speculative-decoding
- ppd_compose
---

# EAGLE-{version} head for {base}

One draft layer ({parameters:,} parameters) that continues the hidden states of `{base}` and guesses its next tokens
([EAGLE-3](https://arxiv.org/abs/2503.01840) and its forerunners). The base's weights and its output stay as they are.

```python
from ppd_compose import compose
from ppd_compose.integrations.eagle import EagleHead

model = compose(base, EagleHead.from_pretrained("this folder or repository"))
model.generate(**inputs, max_new_tokens=128)
```

{vocabulary}
{accuracy}
## Training

{facts}

{belongs}"""
BELONGS = """
The head belongs to the weights with embedding fingerprint `{fingerprint}`; with other weights of the same shapes it
still gives the base's own tokens, but fewer guesses may be right.
"""


def head_card(head: Head) -> str:
    """Markdown with the Hub's metadata on top."""
    base = head.identity
    return TEMPLATE.format(
        relation=relation(base.name if base else ""),
        base=(base.name if base else "") or "a base that its files do not name",
        version=head.config.version,
        parameters=sum(tensor.numel() for tensor in head.network.values()),
        vocabulary=_vocabulary(head),
        accuracy=_accuracy(head),
        facts=facts_list(head.training) or "Not known.",
        belongs=BELONGS.format(fingerprint=base.fingerprint) if base else "",
    )


def _vocabulary(head: Head) -> str:
    if head.lm_head is not None:
        count = f"{head.config.draft_vocab_size} of the {head.config.vocab_size}"
        return f"It guesses {count} tokens of the base, by an output head of its own."
    count = "all" if head.target_ids is None else f"{len(head.target_ids)} of the {head.config.vocab_size}"
    return f"It guesses {count} tokens of the base, by the rows of the base's own output head, which it does not hold."


def _accuracy(head: Head) -> str:
    """How often the first guess was right, by depth."""
    if not head.accuracy:
        return ""
    return (
        "\n## Accuracy on held-out replies of the base\n\n"
        "How often the first guess was right when all before it were.\n\n"
        + accuracy_table("depth", np.array(head.accuracy)[:, None])
        + "\n"
    )
