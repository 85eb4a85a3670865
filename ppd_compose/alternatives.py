"""Plugins that decide otherwise than the defaults do, to compare with: `compose(..., plugins=[HighestClaim()])`.

Knows the hooks that they take over. Nothing else uses them.
"""

from __future__ import annotations

from collections.abc import Sequence

from .hookspecs import hookimpl
from .tree import TokenTree, union


class HighestClaim:
    """Merge: every claim is believed, and of several for one node the highest counts."""

    name = "highest-claim"

    @hookimpl
    def merge(self, trees: Sequence[TokenTree]) -> TokenTree:
        """Every path of every drafter once."""
        return union(trees)


class AlwaysAsk:
    """Ask: every drafter at every step, whatever it takes."""

    name = "always-ask"

    @hookimpl
    def ask(self) -> bool:
        """Yes."""
        return True
