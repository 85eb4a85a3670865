"""Prompts from a file, and the token ids that the model gets for them.

Knows JSON lines and chat templates. Does not know models.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

HALF = re.compile("[\ud800-\udfff]")  # JSON may write two halves of a character each on its own, UTF-8 has none


@dataclass(frozen=True)
class Prompt:
    """The turns of one user and the category that they are reported under."""

    turns: tuple[str, ...]
    category: str = "all"


def read_prompts(path: Path) -> list[Prompt]:
    """Read JSON lines: `{"prompt": str}` or `{"turns": [str, ...]}`, each with an optional `"category"`.

    Raises `FileNotFoundError`, or `ValueError` naming the line that cannot be read; an empty file too.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON may hold other line breaks unescaped
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    prompts = [_read_line(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ValueError(f'{path} holds no prompts: write one JSON object a line, such as {{"prompt": "Hello"}}')
    return prompts


def _read_line(path: Path, number: int, line: str) -> Prompt:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # too long a number, or too many lists in lists
        why = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"{path}, line {number}: not JSON ({why}): {line[:60]!r}") from None
    turns = _turns(record)
    if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError(f'{path}, line {number}: needs "prompt" (text) or "turns" (texts), got {line[:60]!r}')
    category = str(record.get("category", "all"))
    if any(HALF.search(text) for text in (*turns, category)):
        raise ValueError(
            f"{path}, line {number}: a text holds half of a character (a lone surrogate such as \\ud83d), which no "
            f"tokenizer takes: write it whole or leave it out, got {line[:60]!r}"
        )
    return Prompt(tuple(turns), category)


def _turns(record: Any) -> list[Any]:
    if not isinstance(record, dict):
        return []
    turns = record.get("turns", [record.get("prompt")])
    return turns if isinstance(turns, list) else []


def encode(tokenizer: PreTrainedTokenizerBase, *texts: str) -> list[int]:
    """Token ids of a conversation in the tokenizer's chat template where it has one: the user's first turn, the answer
    to it, the next turn and so on, at last one of the user's."""
    if tokenizer.chat_template is None:
        return list(tokenizer("\n".join(texts))["input_ids"])
    said = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]
    chat = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(chat, add_special_tokens=False)["input_ids"])
