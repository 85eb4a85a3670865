"""What goes between the host and a device: in few copies, and nobody waits where he need not.

Knows copies, and how the host waits. Does not know what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .tree import Bools, Ints


def wait(device: torch.device) -> None:
    """Until `device` has done what it was told."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # the whole device may not be waited for in captures
    elif device.type != "cpu":
        torch.accelerator.synchronize(device)


def waits_by_itself(device: torch.device) -> bool:
    """Whether a copy to `device` that does not block has read ordinary memory of the host when it returns, as CUDA's
    has: the source may be written over at once."""
    return device.type == "cuda"


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; the host goes on at once where it may."""
    return tensor.to(device, non_blocking=waits_by_itself(device))


def in_one(numbers: Ints, *flags: Bools) -> Tensor:
    """All of them as bytes on the host, one behind the other, so that they go to a device in one copy."""
    return torch.from_numpy(np.concatenate([each.ravel().view(np.uint8) for each in (numbers, *flags)]))


def apart(told: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` numbers, and all flags `[flags]`, that `in_one` put together, in the same memory."""
    return told[: 8 * count].view(torch.int64), told[8 * count :].view(torch.bool)


def rows_of(told: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows `rows` of `told`, whose device is not told their numbers; those that ascend one by one need no copy."""
    first = rows[0] if rows else 0
    if list(rows) == list(range(first, first + len(rows))):
        return told.narrow(0, first, len(rows))
    return torch.stack([told[row] for row in rows])


def bringing(*tensors: Tensor) -> Callable[[], list[Tensor]]:
    """Put `tensors` together where the first one is, at once; what is given brings them to the host in one copy, for
    which it waits."""
    parts = [tensor.reshape(-1).view(torch.uint8).to(tensors[0].device) for tensor in tensors]
    together = torch.cat(parts)

    def bring() -> list[Tensor]:
        told = together.cpu().split([len(part) for part in parts])
        # A copy of each, as numbers may not begin anywhere.
        return [mine.clone().view(one.dtype).view(one.shape) for mine, one in zip(told, tensors, strict=True)]

    return bring


@contextmanager
def timed(device: torch.device) -> Iterator[Callable[[], float]]:
    """Gives the seconds that a CUDA device takes for what it is told within, to be asked once it was waited for; of
    other devices nobody knows: 0."""
    if device.type != "cuda":
        yield lambda: 0.0
        return
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record(torch.cuda.current_stream(device))
    yield lambda: begin.elapsed_time(end) / 1000
    end.record(torch.cuda.current_stream(device))


def for_host(claims: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    """`claims` and `tokens`, both of one shape, as `on_host` takes them: off the CPU as one tensor."""
    return (claims.float(), tokens) if claims.device.type == "cpu" else (_packed(claims, tokens),)


def on_host(*told: Tensor) -> tuple[NDArray[np.float32], Ints]:
    """Claims in float32 and tokens, brought from their device in one copy; `told` is what `for_host` made of them.

    What is no number, as where half precision overflows, is claimed by nobody: -inf.
    """
    if len(told) == 1:
        claims, tokens = _unpacked(told[0].numpy(force=True))
    else:
        claims, tokens = told[0].numpy(force=True), told[1].numpy()
    return np.fmax(claims, -np.inf), tokens  # of a number and NaN that takes the number


def all_on_host(told: Sequence[tuple[Tensor, ...]]) -> list[tuple[NDArray[np.float32], Ints]]:
    """Of several the same, all in one copy."""
    each = iter(bringing(*(tensor for one in told for tensor in one))())
    return [on_host(*(next(each) for _ in one)) for one in told]


def tokens_of(*told: Tensor) -> Tensor:
    """The tokens, int64, of what `for_host` made, on their device."""
    return told[1] if len(told) > 1 else told[0][1].long()


def _packed(claims: Tensor, tokens: Tensor) -> Tensor:
    """Both as int32, bit for bit: there are fewer tokens than that."""
    return torch.stack([claims.float().view(torch.int32), tokens.int()])


def _unpacked(both: NDArray[np.int32]) -> tuple[NDArray[np.float32], Ints]:
    return both[0].view(np.float32), both[1].astype(np.int64)
