"""Prompt lookup: what followed the longest repeated ending of the text so far is guessed to follow again.

Knows the text of one sequence as a suffix automaton (Blumer et al., 1985). Needs no training and no forward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ppd_compose import Step, TokenTree, hookimpl
from ppd_compose.best_first import best_first

WALK = 64  # suffixes whose counts a token brings up to date, the longest first
BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16)  # lengths of a match from which its guesses are counted together
FORGET = 0.98  # how much of the past counts after each token
PRIOR = 4.0  # guesses that the prior chance stands for


class PromptLookup:
    """Drafter: continuations of the longest ending of prompt and output that occurred before, as a tree.

    A guess claims (how often the next token was known after matches of that length) x (its share of what followed);
    the former is counted while the text grows, starting from a prior.

    Args:
        size: most nodes of a draft.
        depth: most tokens of a path.
        shortest: tokens that must match before anything is guessed.

    Raises:
        ValueError: one of them is below 1.
    """

    name = "lookup"

    def __init__(self, size: int = 24, depth: int = 16, shortest: int = 1) -> None:
        if min(size, depth, shortest) < 1:
            raise ValueError(f"size, depth and shortest must be at least 1, got {size}, {depth} and {shortest}")
        self.size, self.depth, self.shortest = size, depth, shortest
        self.settings = {"size": size, "depth": depth, "shortest": shortest}

    @hookimpl
    def start(self, step: Step) -> None:
        """Read the prompt."""
        text = step.memory[self] = Text()
        for token in step.ids:
            text.append(token)

    @hookimpl
    def propose(self, step: Step) -> TokenTree | None:
        """The likeliest continuations, best first."""
        rows: list[tuple[int, int, float]] = [(step.ids[-1], -1, 0.0)]
        wanted = min(self.size, step.budget.max_rows - 1)
        for token, parent, claim in step.memory[self].continuations(wanted, self.depth, self.shortest):
            rows.append((token, parent, claim))
        if len(rows) == 1:
            return None
        return TokenTree.of(*zip(*rows, strict=True))

    @hookimpl
    def observe(self, step: Step) -> None:
        """Read what was accepted, counting for matches of every length how often it was known."""
        text: Text = step.memory[self]
        for token in step.ids[-len(step.path) :]:
            text.judge(token)
            text.append(token)


class Text:
    """A growing text and its suffix automaton: a state stands for the substrings that end at the same places."""

    def __init__(self) -> None:
        self.next: list[dict[int, int]] = [{}]
        self.link, self.length, self.seen = [-1], [0], [0]
        self.last = 0
        # By match length: (matches whose continuation came, matches), prior included; longer ones are surer.
        self.counts = [[PRIOR * (1 - 0.6 / (1 + 0.6 * at)), PRIOR] for at in range(len(BUCKETS))]

    def append(self, token: int) -> None:
        """Add one token, in amortised constant time."""
        new, at = self._state({}, -1, self.length[self.last] + 1, 0), self.last
        while at != -1 and token not in self.next[at]:
            self.next[at][token] = new
            at = self.link[at]
        self.link[new] = 0 if at == -1 else self._suffix(at, token)
        self.last = new
        # In text that repeats itself endlessly the shorter suffixes, of which there are many, are never asked.
        for _ in range(WALK):
            if new <= 0:
                break
            self.seen[new] += 1
            new = self.link[new]

    def _suffix(self, at: int, token: int) -> int:
        """The state of exactly the string of `at` and `token`, split off where it stands for longer ones too."""
        old = self.next[at][token]
        if self.length[old] == self.length[at] + 1:
            return old
        clone = self._state(dict(self.next[old]), self.link[old], self.length[at] + 1, self.seen[old])
        self.link[old] = clone
        while at != -1 and self.next[at].get(token) == old:
            self.next[at][token] = clone
            at = self.link[at]
        return clone

    def _state(self, following: dict[int, int], link: int, length: int, seen: int) -> int:
        self.next.append(following)
        self.link.append(link)
        self.length.append(length)
        self.seen.append(seen)
        return len(self.next) - 1

    def judge(self, token: int) -> None:
        """Whether `token`, which comes next, is one that followed the longest repeated ending."""
        match = self.link[self.last]
        if match <= 0:
            return
        counts = self.counts[_bucket(self.length[match])]
        counts[0] = FORGET * counts[0] + (token in self.next[match])
        counts[1] = FORGET * counts[1] + 1

    def continuations(self, size: int, depth: int, shortest: int) -> Iterator[tuple[int, int, float]]:
        """Tokens that may follow, a parent before its children: (token, parent's row, log of the claimed chance).

        Row 0 is the last token of the text.
        """
        match = self.link[self.last]
        if match <= 0 or self.length[match] < shortest:
            return
        yield from best_first((match, self.length[match]), self._after, self._enter, size, depth)

    def _after(self, at: tuple[int, int]) -> list[tuple[int, float]]:
        """What followed a state, at the end of a match of that length, with the logarithms of its chances."""
        state, matched = at
        if (known := self._repeated(state)) != state:
            matched = self.length[known]
        if known <= 0:
            return []
        hits, of = self.counts[_bucket(matched)]
        following = self.next[known].items()
        total = sum(max(self.seen[q], 1) for _, q in following)
        return [(token, math.log(hits / of * max(self.seen[q], 1) / total)) for token, q in following]

    def _enter(self, at: tuple[int, int], token: int) -> tuple[int, int]:
        return self.next[self._repeated(at[0])][token], at[1] + 1

    def _repeated(self, state: int) -> int:
        """`state`, or where the text ends there, that of its longest ending that occurred before."""
        return state if self.next[state] else self.link[state]


def _bucket(length: int) -> int:
    return max(at for at, least in enumerate(BUCKETS) if length >= least)
