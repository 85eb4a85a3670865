"""Which drafters are asked at a step: those whose guesses are worth the time that they take.

Knows seconds and what guesses added. Does not know what they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

TIMED = 16  # times a drafter is timed; what it takes is then settled, so that decisions do not follow the clock
TRIED = 8  # first times, which tell little: much is made at its first use, and drafts have not found their size
FORGET = 0.95  # how much of what was gained counts after each time
SHARE = 0.01  # of all time, what drafters that do not pay may take in all to show that they would


@dataclass
class Asked:
    """What asking one drafter took and gained, and how long it waits for its next turn."""

    seconds: list[float] = field(default_factory=list)
    gained: float = 0.0  # tokens, each time weighing less than the next
    times: float = 0.0
    wait: float = 1.0  # steps from one turn to the next
    passed: int = 0  # steps since its last turn

    @property
    def typical(self) -> float:
        """Seconds that one turn takes; while only first ones are known, the least of these."""
        return median(self.seconds[TRIED:] or [min(self.seconds)])

    def turn(self) -> bool:
        """Whether it is asked at this step."""
        self.passed += 1
        return self.passed >= self.wait

    def judge(self, seconds: float, gained: float, rate: float, forward: float, drafters: int = 1) -> None:
        """Book one turn: `seconds` spent, tokens `gained`.

        One that pays is asked at every step, and so is any until it was timed `TIMED` times, `TRIED` if it gained
        nothing at all. After that all that do not pay wait, so that together they take `SHARE` of the time. `rate` is
        the tokens that a second is worth, `forward` the seconds of a forward of one row, `drafters` among how many the
        time to show what they would add is divided.
        """
        self.passed = 0
        if len(self.seconds) < TIMED:
            self.seconds.append(seconds)
        self.gained, self.times = FORGET * self.gained + gained, FORGET * self.times + 1
        known = len(self.seconds) >= (TIMED if self.gained > 0 else TRIED)
        pays = self.gained / self.times >= rate * self.typical
        self.wait = drafters * self.typical / (SHARE * forward) if known and not pays else 1.0
