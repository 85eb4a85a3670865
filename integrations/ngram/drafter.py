"""Drafter: what the model tends to say after its last few tokens, from a table that was counted beforehand.

Knows the hooks. The table is `table`, its file `files`, how it is counted `train`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ppd_compose import Step, TokenTree, hookimpl
from ppd_compose.best_first import best_first
from ppd_compose.hub import PushesToHub
from ppd_compose.identity import Identity

from .files import Stored, read_folder, recognises, write_folder
from .table import Table


class NGramTable(PushesToHub):
    """Drafter: the likeliest continuations by an n-gram model of what the base says, as a tree.

    Needs no forward. Other bases with the same tokenizer are served too, by what the counted one tends to say.

    Args:
        table: chances of tokens after contexts.
        size: most nodes of a draft.
        depth: most tokens of a path.
        accuracy: `[rank]`, how often the guess of that rank was the next token on held-out replies. It is kept and
            shown, and decides nothing.
        identity: the base whose replies were counted, checked by `compose`.
        training: how they were counted, as plain data.

    Raises:
        ValueError: size or depth below 1, or accuracies that are no shares.
    """

    name = "ngram"

    def __init__(
        self,
        table: Table,
        *,
        size: int = 16,
        depth: int = 8,
        accuracy: Sequence[float] = (),
        identity: Identity | None = None,
        training: Mapping[str, Any] | None = None,
    ) -> None:
        if min(size, depth) < 1:
            raise ValueError(f"size and depth must be at least 1, got {size} and {depth}")
        if not all(0 <= share <= 1 for share in accuracy):
            raise ValueError(f"accuracy must be shares between 0 and 1, got {accuracy}")
        self.table, self.size, self.depth = table, size, depth
        self.settings = {"size": size, "depth": depth}
        self.accuracy, self.identity = tuple(accuracy), identity
        self.training = dict(training or {})

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        size: int = 16,
        depth: int = 8,
        revision: str | None = None,
        token: str | None = None,
    ) -> NGramTable:
        """Load a table from a folder or the Hub; see `files.read_folder` for what is refused."""
        stored = read_folder(source, revision=revision, token=token)
        return cls(
            stored.table, size=size, depth=depth, accuracy=stored.accuracy, identity=stored.identity,
            training=stored.training,
        )  # fmt: skip

    def save_pretrained(self, folder: str | Path, *, card: str = "") -> None:
        """Write config and tensors, and `card` as README.md beside."""
        write_folder(Stored(self.table, self.identity, self.accuracy, self.training), Path(folder), card)

    @staticmethod
    def recognises(config: Mapping[str, Any], files: set[str]) -> bool:
        """Does a folder with these file names hold such a table?"""
        return recognises(files)

    @hookimpl
    def prepare(self, model: PreTrainedModel) -> None:
        """Refuse a base without some of the tokens; warn when it is another one than was counted."""
        base, counted = Identity.of(model), self.identity
        if self.table.largest >= base.vocab_size:
            raise ValueError(
                f"this n-gram table names token {self.table.largest}; it cannot be used on {base}: give the table of "
                f"a base with the same tokenizer{f', as {counted} has it' if counted else ''}"
            )
        if counted is not None and counted.fingerprint != base.fingerprint:
            warnings.warn(
                f"{base} is not {counted}, whose replies this n-gram table counts. The tokens stay the same, but fewer "
                "guesses may be right, and hardly any where the tokenizers differ",
                stacklevel=2,
            )
        self.table.after([0])  # the first search makes the table's index: now, and not while decoding

    @hookimpl
    def propose(self, step: Step) -> TokenTree | None:
        """The likeliest continuations of the text, best first."""
        size = min(self.size, step.budget.max_rows - 1)
        order, text = self.table.order, tuple(step.ids[-self.table.order :])
        found = best_first(text, self.table.after, lambda text, token: (*text, token)[-order:], size, self.depth)
        rows = [(step.ids[-1], -1, 0.0), *found]
        return TokenTree.of(*zip(*rows, strict=True)) if len(rows) > 1 else None
