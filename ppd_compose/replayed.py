"""Functions of tensors, recorded once for each of their shapes and played again; what a sequence has to itself.

Knows shapes, whose the answers are, and what is let go together. Does not know what is computed, or how a device
records.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .device import sent, waits_by_itself
from .mask import unplanned
from .recorders import Recorder

Thing = TypeVar("Thing")

MOST = 64  # recordings that go together: each holds what it gives


class RecordingStore:
    """What one recorder has recorded, all of which is let go together; what cannot be recorded is computed anew each
    time, with a word.

    Args:
        make: makes a recorder.
        what: is recorded, in the plural.
    """

    def __init__(self, make: Callable[[], Recorder], what: str) -> None:
        self.make, self.what, self.works = make, what, True
        self.made = 0  # recordings so far
        self.forget()

    def forget(self) -> None:
        """Let go of all recordings, and of what they share."""
        self.recordings: dict[Hashable, Any] = {}
        self.record = self.make()

    def kept(self, key: Hashable, made: Callable[[], Thing]) -> Thing:
        """The recording of `key`, which is `made` the first time."""
        if key not in self.recordings:
            if len(self.recordings) == MOST:
                self.forget()
            self.recordings[key] = made()
            self.made += 1
        recording: Thing = self.recordings[key]
        return recording

    def player(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """What does again what `run` does, on the same tensors."""
        if self.works:
            try:
                return self.record(run)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.works = False
                told = f"{self.what} cannot be recorded, so each is launched anew: {error}"
                warnings.warn(told, stacklevel=2)
        return run


class _RecordedCall(NamedTuple):
    given: tuple[Tensor, ...]  # what it reads
    play: Callable[[], tuple[Tensor, ...]]


class Replayed:
    """`run`, which takes tensors and gives a tuple of them, recorded once for each of their shapes.

    Beside those given to it `run` may read and write tensors that stay, and nothing else. What comes back belongs to
    the caller. One sequence at a time may use it.

    Args:
        run: also takes, by keyword, what a recording takes for given.
        device: where it computes; what is given may be on the host.
        store: where its recordings are kept; None launches it anew each time.
    """

    def __init__(
        self, run: Callable[..., tuple[Tensor, ...]], device: torch.device, store: RecordingStore | None
    ) -> None:
        self.run, self.device, self.store = run, device, store

    @classmethod
    def alone(
        cls,
        run: Callable[..., tuple[Tensor, ...]],
        device: torch.device,
        make_recorder: Callable[[], Recorder] | None,
        what: str,
    ) -> Replayed:
        """With recordings of its own, where a recorder is made: see `RecordingStore`."""
        return cls(run, device, make_recorder and RecordingStore(make_recorder, what))

    def __call__(self, *given: Tensor, **fixed: Hashable) -> tuple[Tensor, ...]:
        """What `run` gives."""
        if self.store is None:
            return self.launched(*given, **fixed)
        key = (id(self), *((tensor.shape, tensor.dtype) for tensor in given), *sorted(fixed.items()))
        recording = self.store.kept(key, partial(self._made, self.store, given, fixed))
        for mine, theirs in zip(recording.given, given, strict=True):
            mine.copy_(theirs, non_blocking=waits_by_itself(self.device))
        return tuple(told.clone() for told in recording.play())

    def launched(self, *given: Tensor, **fixed: Hashable) -> tuple[Tensor, ...]:
        """The same, and nothing is recorded: for shapes that are not met again."""
        there = [sent(tensor, self.device) for tensor in given]
        with unplanned(self.device):
            return self.run(*there, **fixed)

    def _made(self, store: RecordingStore, given: Sequence[Tensor], fixed: Mapping[str, Hashable]) -> _RecordedCall:
        with torch.inference_mode(False):  # what was made within could not be written to without
            mine = tuple(torch.empty_like(tensor, device=self.device) for tensor in given)
        for tensor, theirs in zip(mine, given, strict=True):
            tensor.copy_(theirs)
        return _RecordedCall(mine, store.player(partial(self.run, *mine, **fixed)))


class Lending(Generic[Thing]):
    """Things of which each sequence has one to itself while it is decoded; another is made where none is free."""

    def __init__(self, make: Callable[[], Thing]) -> None:
        self.make = make
        self.free: list[Thing] = []

    @contextmanager
    def lent(self) -> Iterator[Thing]:
        """Within, one is the caller's."""
        try:  # and not by asking before: another thread may take the last one
            thing = self.free.pop()
        except IndexError:
            thing = self.make()
        try:
            yield thing
        finally:
            self.free.append(thing)


class Lendings(Generic[Thing]):
    """A lending for each model, made anew where what it took for given is no longer so."""

    def __init__(self) -> None:
        self.by_model: WeakKeyDictionary[Any, tuple[Any, Lending[Thing]]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[Lendings[Thing]], tuple[()]]:
        # Neither copied nor pickled with whom it belongs to: all of it can be made again.
        return type(self), ()

    def of(self, model: Any, state: Any, ready: Callable[[], Callable[[], Thing]]) -> Lending[Thing]:
        """That of `model`, which is in `state`; `ready` gives what makes one thing."""
        known, lending = self.by_model.get(model, (None, None))
        if lending is None or known != state:
            lending = Lending(ready())
            self.by_model[model] = state, lending
        return lending
