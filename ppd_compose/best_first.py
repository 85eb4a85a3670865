"""The likeliest continuations of a text that is known token by token.

Knows a heap. Does not know where a text stands, nor what follows there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from heapq import heappop, heappush
from itertools import count
from typing import TypeVar

Place = TypeVar("Place")


def best_first(
    start: Place,
    after: Callable[[Place], Iterable[tuple[int, float]]],
    enter: Callable[[Place, int], Place],
    size: int,
    depth: int,
) -> Iterator[tuple[int, int, float]]:
    """Nodes below a root, the likeliest first and a parent before its children: (token, parent's row, logarithm of the
    chance of the whole path). The root is row 0.

    Args:
        start: where the text stands at the root.
        after: tokens that may follow there, with the logarithms of their chances.
        enter: where the text stands after one of them; asked of nodes that are taken alone.
        size: most nodes, without the root.
        depth: most tokens of a path.
    """
    heap: list[tuple[float, int, int, int, Place, int]] = []
    order = count()  # of equals the first found goes first
    place, claim, level = start, 0.0, 0
    for row in range(size):
        if level < depth:
            for token, chance in after(place):
                heappush(heap, (-claim - chance, next(order), token, row, place, level + 1))
        if not heap:
            return
        cost, _, token, parent, above, level = heappop(heap)
        place, claim = enter(above, token), -cost
        yield token, parent, claim
