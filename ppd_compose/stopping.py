"""Whether a sequence ends, asked after every token.

Knows the two criteria that nearly every call has: asked as tensors they take longer than choosing the token. Does not
know where tokens come from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria


class Stops:
    """`criteria`, those of a length or of last tokens asked as numbers, all others as they are."""

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        self.lengths = [each for each in criteria if _is_length(each)]
        self.ends = {int(token) for each in criteria if type(each) is EosTokenCriteria for token in each.eos_token_id}
        self.others = StoppingCriteriaList(
            [each for each in criteria if type(each) is not EosTokenCriteria and not _is_length(each)]
        )

    def __call__(self, ids: Callable[[], Tensor], length: int, token: int, scores: tuple[Tensor, ...] | None) -> bool:
        """Whether one of them holds for the sequence `ids()` `[1, length]`, whose last token is `token`."""
        sequence: Any = ids() if self.others else None
        asked = bool(self.others(sequence, scores).all()) if self.others else False
        return asked or token in self.ends or any(length >= each.max_length for each in self.lengths)


def _is_length(criterion: Any) -> bool:
    """Whether it is a length alone, and never warns of more positions than the model has."""
    if type(criterion) is not MaxLengthCriteria:
        return False
    positions = criterion.max_position_embeddings
    return positions is None or criterion.max_length <= positions
