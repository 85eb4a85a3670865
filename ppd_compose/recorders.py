"""What a device is told, recorded once and told again: CUDA graphs.

Knows the rules by which torch records them. Does not know what is recorded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from threading import Lock
from typing import Any

import torch

WARM = 2  # forwards and one more before one is recorded: kernels are chosen and compiled meanwhile

Recorder = Callable[[Callable[[], Any]], Callable[[], Any]]


class CudaGraphs:
    """Recorder of what a CUDA device is told: gives back what plays it again into the same tensors.

    All graphs of one recorder share their memory, as only one at a time is played and what it gave is copied. They are
    to go together: with the last of them that memory does, and so does what kernels keep for their stream.

    Args:
        device: the device.
        never_wait: functions that do not wait for it, as was seen; see `recorders_of`.
    """

    def __init__(self, device: torch.device, never_wait: set[Any]) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool: Any = None
        self.never_wait = never_wait

    def __call__(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Record `run`, which may read and write nothing but tensors that stay, and never wait for the device.

        Raises `RuntimeError` where it does wait, before anything is recorded: a recording that breaks off would leave
        torch's allocator in disorder. That is seen once of each function, whatever the sizes that it is given.
        """
        function = _function_of(run)
        with _one_at_a_time, torch.cuda.device(self.stream.device):
            now = torch.cuda.current_stream()
            self.stream.wait_stream(now)
            try:
                with torch.cuda.stream(self.stream):
                    for _ in range(WARM):
                        run()
                    with nullcontext() if function in self.never_wait else _refusing_to_wait():
                        run()
                    self.never_wait.add(function)
                graph = torch.cuda.CUDAGraph()
                recording = torch.cuda.graph(
                    graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
                )
                with _workspaces_within(), recording:
                    out = run()
            finally:
                torch.cuda.set_stream(now)
                now.wait_stream(self.stream)
        self.pool = graph.pool()

        def play() -> Any:
            graph.replay()
            return out

        return play


def _function_of(run: Any) -> Any:
    """What `run` calls, without what it is given and whose it is."""
    function = getattr(run, "func", run)
    return getattr(function, "__func__", function)


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """Within, whoever waits for the device gets a `RuntimeError`: in other threads too, so it is seldom."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that this is a prototype, where warnings may be errors
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _workspaces_within() -> Iterator[None]:
    """Within, matrix products get the memory that they work in anew, so in a recording out of its own: what they had
    before belongs to the stream, and others let go of it, as inductor's graphs do of all there is."""
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


_one_at_a_time = Lock()  # a process may record one graph at a time
RECORDERS: dict[str, Callable[[torch.device, set[Any]], Recorder]] = {"cuda": CudaGraphs}  # by kind of device


def recorders_of(device: torch.device) -> Callable[[], Recorder]:
    """Makes recorders of what `device` is told, which share what was seen of functions: while one is looked at, other
    threads that wait for the device fail."""
    return partial(RECORDERS[device.type], device, set())
