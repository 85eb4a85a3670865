"""The one prompt token that a draft model was trained with (PARD), an id of its own vocabulary.

Knows under which keys configurations name it and how far it reaches, and which ids are free to become it. Does not
know how it is trained.
"""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# As vLLM reads them for parallel drafting with a draft model; the first is the one that PARD's own files have.
KEYS = ("pard_token", "ptd_token_id")
REACH = "pard_num_tokens"  # ours: the tokens that were guessed in one forward when it was trained
USUAL_DEPTH = 4


def shared_token(config: PreTrainedConfig) -> int | None:
    """The id, None when the configuration names none. Raises `ValueError` when it is no token."""
    size: int = config.get_text_config().vocab_size
    return next((_whole(config, key, 0, size - 1) for key in KEYS if getattr(config, key, None) is not None), None)


def usual_depth(config: PreTrainedConfig) -> int:
    """Tokens that the draft model was trained to guess in one forward, a few when its configuration does not say."""
    return USUAL_DEPTH if getattr(config, REACH, None) is None else _whole(config, REACH, 1, 1000)


def _whole(config: PreTrainedConfig, key: str, least: int, most: int) -> int:
    value = getattr(config, key)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(
            f"the draft model's configuration has {key}={value!r}: it must be a whole number from {least} to {most}"
        )
    return value


def choose_token(given: str | None, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of a token that no text holds.

    Args:
        given: an id in digits or the text of a token; None takes the last row of the vocabulary, where the tokenizer
            does not use it.

    Raises:
        ValueError: `given` is no token, or there is no unused row.
    """
    size: int = config.get_text_config().vocab_size
    used: dict[str, int] = tokenizer.get_vocab()
    if given is None:
        if max(used.values()) >= size - 1:
            raise ValueError(
                f"the tokenizer uses all {size} rows of the vocabulary: name a token that the base never writes, "
                "such as a reserved one, by its id or its text"
            )
        return size - 1
    found = int(given) if given.isdecimal() else used.get(given, -1)
    if not 0 <= found < size:
        raise ValueError(f"{given!r} is no token of this vocabulary of {size}: give an id or the text of a token")
    return found
