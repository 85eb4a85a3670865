"""Memory left to the system: of tensors that lie in a file, as those that safetensors reads do, until they are read
again, and what the allocator holds that nobody uses.

Knows Linux; elsewhere nothing happens. Does not know models.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from torch import Tensor

PAGE_OUT = 21  # MADV_PAGEOUT, of Linux 5.4


def page_out(tensor: Tensor) -> None:
    """Tell the system that `tensor` is not read soon. Where it lies in a file, its pages go, and come back with the
    same numbers when it is read; those that were written to are kept."""
    if sys.platform != "linux" or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    page = os.sysconf("SC_PAGESIZE")
    first, last = -(-tensor.data_ptr() // page), (tensor.data_ptr() + tensor.nbytes) // page
    if last > first and _lies_in_a_file(first * page, last * page):
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        advise(first * page, (last - first) * page, PAGE_OUT)  # advice: a system may refuse it


def give_back() -> None:
    """Leave to the system what was freed. glibc keeps what lies between things that are still in use: after large
    temporaries of different sizes as much as half of them."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # other C libraries have none
        trim(ctypes.c_size_t(0))


def _lies_in_a_file(begin: int, end: int) -> bool:
    """Whether the addresses from `begin` to `end` are a file's, by what Linux tells of this process."""
    try:
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:  # as in a sandbox
        return False
    for line in lines:
        span, _, _, _, _, *path = line.split(maxsplit=5)
        low, high = (int(address, 16) for address in span.split("-"))
        if low <= begin < high:
            return end <= high and bool(path) and path[0].startswith("/")
    return False
