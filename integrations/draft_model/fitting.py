"""Which draft model fits which base: what it must be able to do, and whether both read the same tokens.

Knows vocabularies, tokenizers and their special tokens. Does not draft.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ppd_compose.cache import refuse_cache
from ppd_compose.mask import refuse_attention
from ppd_compose.refuse import refuse_base

from .files import read_tokenizer

PADDING = 128  # rows by which vocabularies of one tokenizer differ that were padded for different hardware


def refuse_draft(draft: PreTrainedModel) -> None:
    """Raise `TypeError` or `ValueError` for a draft model that cannot look at a tree of guesses."""
    try:
        refuse_base(draft)
        refuse_attention(draft)
        refuse_cache(DynamicCache(config=draft.config), draft)
    except (TypeError, ValueError) as error:
        raise type(error)(f"the draft model cannot draft: {error}") from None


def compare_vocabularies(
    draft: PreTrainedModel, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Raise `ValueError` unless the same ids are the same tokens, as far as that can be known.

    `tokenizer` is the draft model's. The base's is looked for in the folder that the base was loaded from. Where one of
    both is unknown, sizes and special tokens are compared: other sizes are refused, other special tokens a warning.
    """
    folder = Path(str(base.config.name_or_path or "nowhere"))
    theirs = read_tokenizer(folder)
    if tokenizer is not None and theirs is not None:
        _compare_tokens(tokenizer.get_vocab(), theirs.get_vocab())
        return
    ours, size = _size(draft), _size(base)
    if abs(ours - size) > PADDING:
        raise ValueError(
            f"the draft model has {ours} tokens and the base {size}, more apart than padding explains: take a draft "
            "model with the base's tokenizer"
        )
    for name in ("bos_token_id", "eos_token_id"):
        mine, other = _special(draft, name), _special(base, name)
        if mine and other and not mine & other:
            warnings.warn(
                f"{name} is {sorted(mine)} for the draft model and {sorted(other)} for the base: the tokens stay the "
                "same, but if the tokenizers differ hardly a guess will be right",
                stacklevel=2,
            )


def _compare_tokens(draft: dict[str, int], base: dict[str, int]) -> None:
    ours, theirs = ({id: token for token, id in vocab.items()} for vocab in (draft, base))
    for id in sorted(ours.keys() & theirs.keys()):
        if ours[id] != theirs[id]:
            raise ValueError(
                f"token {id} is {ours[id]!r} for the draft model and {theirs[id]!r} for the base: the draft model must "
                "have the base's tokenizer"
            )
    if (lacking := len(theirs.keys() - ours.keys())) > PADDING:
        raise ValueError(
            f"the draft model's tokenizer lacks {lacking} of the base's {len(theirs)} tokens: the draft model must "
            "have the base's tokenizer"
        )


def _size(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().vocab_size)


def _special(model: PreTrainedModel, name: str) -> set[int]:
    """Ids of the special tokens that `generate` goes by."""
    config = model.generation_config
    value = None if config is None else getattr(config, name)
    return set() if value is None else set(value) if isinstance(value, list) else {int(value)}
