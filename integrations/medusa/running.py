"""Medusa heads at work on one sequence: their forwards, each launched at once where a device can record them.

Knows what heads are asked for. Does not know what they compute, nor candidate trees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ppd_compose.device import for_host
from ppd_compose.recorders import Recorder
from ppd_compose.replayed import RecordingStore, Replayed
from ppd_compose.top import best_tokens

from .heads import Placed


class Running:
    """Heads ready to run beside one base, for one sequence at a time.

    Args:
        placed: the heads.
        width: guesses of each head that are searched for.
        make_recorder: makes what records their forwards; None: they are launched.
    """

    def __init__(self, placed: Placed, width: int, make_recorder: Callable[[], Recorder] | None) -> None:
        self.placed, self.width, self.token_map = placed, width, placed.heads.token_map
        store = make_recorder and RecordingStore(make_recorder, "forwards of Medusa heads")
        device = placed.heads.weight.device
        self.guesses, self.reread = (Replayed(run, device, store) for run in (self._guesses, self._reread))

    def _guesses(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Logarithms of chances and tokens `[heads, width]`, `for_host`, after `hidden` `[1, hidden]`."""
        log_probs, best = best_tokens(self.placed.logits(hidden)[:, 0], self.width)
        return for_host(log_probs, best if self.token_map is None else self.token_map[best])

    def _reread(self, states: Tensor, last: Tensor, root: Tensor) -> tuple[Tensor, ...]:
        """Logits `[distances, entries]` of what prompt tokens say by their states `[distances, 1, hidden]`, that of the
        last token `[1, hidden]` and the root `[1]`."""
        return (self.placed.reread(states, last, root)[:, 0],)


@dataclass
class Held:
    """What is at hand for one sequence."""

    layer: int  # whose hidden states are read
    running: Running
    refined: int = -1  # the step at which prompt tokens were last told better
