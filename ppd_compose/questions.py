"""The questions of a benchmark: which prompts are asked, and what a conversation's later turns are asked after.

Knows Spec-Bench's categories. Does not time or compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .prompts import Prompt, encode

# Spec-Bench's file names the eight subjects of MT-bench; its tables count them as one category.
SUBJECTS = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
MT_BENCH = dict.fromkeys(SUBJECTS, "mt_bench")


@dataclass(frozen=True)
class Question:
    """Token ids `[1, length]` int64 and the category that the answer is counted under."""

    ids: Tensor
    category: str


def questions_from(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    per_category: int | None,
    answer: Callable[[Tensor], list[int]] | None = None,
) -> list[Question]:
    """`per_category` prompts of each category, evenly spread over the file (None: all).

    Args:
        answer: gives prompt and answer to ids `[1, length]`; with it further turns are asked too, after the answers to
            those before, the same for all contenders. None asks first turns only.
    """
    categories: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        categories.setdefault(MT_BENCH.get(prompt.category, prompt.category), []).append(prompt)
    return [
        Question(ids, category)
        for category, mine in categories.items()
        for prompt in _spread(mine, per_category)
        for ids in _turns(prompt, tokenizer, answer)
    ]


def _turns(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, answer: Callable[[Tensor], list[int]] | None
) -> Iterator[Tensor]:
    said: list[str] = []
    for turn in prompt.turns if answer else prompt.turns[:1]:
        said.append(turn)
        ids = torch.tensor([encode(tokenizer, *said)])
        yield ids
        if answer is not None and len(said) < 2 * len(prompt.turns) - 1:
            said.append(str(tokenizer.decode(answer(ids)[ids.shape[1] :], skip_special_tokens=True)))


def _spread(prompts: Sequence[Prompt], count: int | None) -> list[Prompt]:
    if count is None or count >= len(prompts):
        return list(prompts)
    return [prompts[i * len(prompts) // count] for i in range(count)]
