"""What a plugin may see of one sequence that is being decoded.

Knows no model and no loop; the loop fills it in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .tree import Ints, TokenTree

if TYPE_CHECKING:
    from .budget import Budget

FEWEST = 32  # candidates that a drafter may propose at a time


@dataclass(frozen=True)
class Answer:
    """What a plugin's appended rows below the last accepted node said."""

    kinds: Ints  # [rows], as the plugin gave them
    logits: Tensor  # [rows, entries], in the model's dtype, on its device
    hidden_states: Mapping[int, Tensor] = field(default_factory=dict)  # by layer [rows, hidden], where asked for
    tokens: Tensor | None = None  # [entries] int64, the token of each entry; None: entry i is token i


@dataclass(frozen=True)
class Reached:
    """Where the accepted path ends, in tensors on the model's device: the host may not know it yet."""

    root: Tensor  # int64 [1], the token after the path
    hidden_states: Mapping[int, Tensor]  # by layer [1, hidden], of the path's last token, where asked for


@dataclass
class Step:
    """The state of one sequence, without padding. `ids[-1]` is decided but not in the KV cache: it is the root of the
    next tree."""

    ids: list[int]
    vocab_size: int
    budget: Budget
    room: int  # tokens that may still be generated
    drafters: tuple[str, ...] = ()  # names; bit i of a node's sources is the i-th
    before: int = 0  # tokens that are cached but were not given to `generate`: `ids` begins behind them
    index: int = 0  # steps done, the prefill included
    tree: TokenTree | None = None  # what the last step verified
    rows: int = 0  # rows of the last forward, appended ones included
    seconds: float = 0.0  # that the last verify forward took
    rate: float = 0.0  # tokens that a second is worth, by what the last steps made; 0 before there were any
    path: list[int] = field(default_factory=list)  # nodes of `tree` that were accepted, root first
    hidden_states: dict[int, Tensor] = field(default_factory=dict)  # by layer [path, hidden], where asked for
    answers: dict[Any, Answer] = field(default_factory=dict)  # by plugin
    foretold: dict[Any, Sequence[Tensor]] = field(default_factory=dict)  # by drafter, on the host, see `foretell`
    observing: dict[str, float] = field(default_factory=dict)  # seconds in which drafters took up the last step
    drafting: dict[str, float] = field(default_factory=dict)  # seconds of those asked at this step, these included
    memory: dict[Any, Any] = field(default_factory=dict)  # by plugin: its own state for this sequence
    later: list[Callable[[], None]] = field(default_factory=list)  # what nobody waits for, see the hook `observe`
    ending: ExitStack = field(default_factory=ExitStack)  # what is given back when the sequence ends, however it does

    def catch_up(self) -> None:
        """Do what was put off in `later`: the loop does so while the device computes the next forward."""
        waiting, self.later = self.later, []
        for call in waiting:
            call()

    @property
    def length(self) -> int:
        """Tokens of the sequence, the root included."""
        return self.before + len(self.ids)

    @property
    def candidates(self) -> int:
        """How many nodes are worth proposing: four times the rows that the last forward had, and no fewer than
        `FEWEST`, of those that one may have. Nodes that no forward verifies cost time all the same."""
        return min(self.budget.max_rows, max(FEWEST, 4 * self.rows))
