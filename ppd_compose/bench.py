"""Base and compositions side by side on the same questions, interleaved, in one run.

Knows how to time and compare generations. Does not print or load anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .ahead import record_ahead
from .forward import records
from .questions import Question
from .stats import Stats
from .verify import only_last

BASE = "base"


@dataclass(frozen=True)
class Protocol:
    """What is asked and how: every question in each of the `rounds`, greedily at `temperature` 0, else drawn."""

    questions: Sequence[Question]
    rounds: int = 1
    max_new_tokens: int = 128
    temperature: float = 0.0
    all_turns: bool = False  # or first turns only; told, as the questions are made already

    def ask(self, model: Any, number: int) -> list[int]:
        """Prompt and answer of `model` to question `number`; the draws are the same for all."""
        ids = self.questions[number].ids
        if not self.temperature:
            return greedy(model, ids, self.max_new_tokens)
        torch.manual_seed(number)
        return _generated(model, ids, self.max_new_tokens, do_sample=True, temperature=self.temperature, top_k=0)


@dataclass
class Answered:
    """What one contender did with one question: of each round the seconds and, where they are told, the tokens; of the
    last one the sequence and its statistics."""

    category: str
    prompt_length: int
    seconds: list[float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    stats: Stats | None = None
    lengths: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Of the last round's answer."""
        return len(self.ids) - self.prompt_length

    @property
    def each(self) -> list[int]:
        """Tokens of each round's answer."""
        return self.lengths or [self.tokens] * len(self.seconds)


Answers = dict[str, Answered]  # of one question, by contender


class WithSettings:
    """A model whose `generate` is always called with further arguments."""

    def __init__(self, model: Any, settings: Mapping[str, Any]) -> None:
        self.model, self.settings, self.device = model, dict(settings), model.device

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the model's own."""
        out: Tensor = self.model.generate(*args, **kwargs, **self.settings)
        return out


def one_round(
    contenders: Mapping[str, Any], protocol: Protocol, turn: int, done: Container[int] = ()
) -> Iterator[tuple[int, Answers]]:
    """Ask every contender every question that is not `done` once, and yield its number and the answers, by contender.

    The contenders take turns at each question, in an order that rotates with it and with the round, `turn`, so that a
    drift of the machine meets all alike. Each is warmed up first.
    """
    for model in contenders.values():
        _warm_up(model, protocol)
    names = list(contenders)
    for number, question in enumerate(protocol.questions):
        if number in done:
            continue
        answers = {}
        shift = (number + turn) % len(names)
        for name in names[shift:] + names[:shift]:
            begin = time.perf_counter()
            ids = protocol.ask(contenders[name], number)
            seconds, stats = time.perf_counter() - begin, getattr(contenders[name], "stats", None)
            answers[name] = Answered(question.category, question.ids.shape[1], [seconds], ids, stats)
        yield number, answers


def _warm_up(model: Any, protocol: Protocol) -> None:
    """Let `model` answer the first question read backwards: read as it is, what learns while it decodes would know the
    beginning of the answer. What is recorded of forwards is recorded now, and not while answers are timed."""
    greedy(model, protocol.questions[0].ids.flip(1), protocol.max_new_tokens if records(model) else 16)
    if records(model):
        record_ahead(model, max(question.ids.shape[1] for question in protocol.questions) + protocol.max_new_tokens)


def joined(rounds: Sequence[Answered]) -> Answered:
    """One contender's answer to a question: that of the last round, with the seconds and tokens of all."""
    seconds = [seconds for answer in rounds for seconds in answer.seconds]
    return replace(rounds[-1], seconds=seconds, lengths=[tokens for answer in rounds for tokens in answer.each])


def greedy(model: Any, ids: Tensor, max_new_tokens: int) -> list[int]:
    """Prompt and greedy answer to `ids` `[1, length]`, wherever `model` is."""
    return _generated(model, ids, max_new_tokens, do_sample=False)


def _generated(model: Any, ids: Tensor, max_new_tokens: int, **settings: Any) -> list[int]:
    mask = torch.ones_like(ids)
    out = model.generate(ids.to(model.device), attention_mask=mask.to(model.device),
                         max_new_tokens=max_new_tokens, **settings)  # fmt: skip
    return list(getattr(out, "sequences", out)[0].tolist())  # a base may be set to return more than tokens


def summarise(name: str, answers: Sequence[Answered], base: Sequence[Answered]) -> dict[str, Any]:
    """Figures of one contender: total tokens by total seconds, where a question counts the medians of its rounds."""
    stats = [a.stats for a in answers if a.stats is not None]
    forwards = sum(s.forwards for s in stats)
    return {
        "name": name,
        "tokens_per_second": _rate(answers),
        "speedup": _rate(answers) / _rate(base),
        "tokens_per_second_after_prefill": _after_prefill(answers),
        "speedup_by_round": _by_round(answers, base),
        "tokens_per_forward": sum(s.tokens for s in stats) / max(forwards, 1),
        "expected_per_forward": sum(s.expected for s in stats) / max(forwards, 1),
        **_calibration(stats),
        "rows_per_forward": sum(s.rows for s in stats) / max(forwards, 1),
        "host_ms_per_step": 1000 * sum(s.host_seconds for s in stats) / max(forwards, 1),
        "identical": sum(a.ids == b.ids for a, b in zip(answers, base, strict=True)),
        "questions": len(answers),
        "acceptance": _acceptance(stats),
        "reliability": _reliability(stats),
        "by_category": {c: _category(c, answers, base) for c in dict.fromkeys(a.category for a in answers)},
    }


def _calibration(stats: Sequence[Stats]) -> dict[str, float]:
    """Tokens expected by those found, and how far chance alone moves that from one set of so many questions to the
    next: the standard error of a ratio of sums (Cochran 1977, chapter 6), each question one draw."""
    expected, found = (np.array([getattr(s, name) for s in stats], float) for name in ("expected", "tokens"))
    if len(stats) < 2 or not found.sum():
        return {}
    ratio = expected.sum() / found.sum()
    error = np.sqrt(len(stats) / (len(stats) - 1) * ((expected - ratio * found) ** 2).sum()) / found.sum()
    return {"expected_over_found": float(ratio), "expected_over_found_error": float(error)}


def _rate(answers: Sequence[Answered]) -> float:
    return sum(median(a.each) for a in answers) / sum(median(a.seconds) for a in answers)


def _after_prefill(answers: Sequence[Answered]) -> float:
    """Tokens by the seconds of the last round that drafters can change; 0 for those who do not tell their prefill."""
    told = [(a.tokens, a.seconds[-1] - a.stats.seconds["prefill"]) for a in answers if a.stats is not None]
    return sum(tokens for tokens, _ in told) / sum(seconds for _, seconds in told) if told else 0.0


def _by_round(answers: Sequence[Answered], base: Sequence[Answered]) -> list[float]:
    """Speed-up in each round, every question counted."""
    mine, theirs = (
        np.sum([a.each for a in those], axis=0) / np.sum([a.seconds for a in those], axis=0)
        for those in (answers, base)
    )
    return list(map(float, mine / theirs))


def _category(category: str, answers: Sequence[Answered], base: Sequence[Answered]) -> dict[str, Any]:
    mine = [a for a in answers if a.category == category]
    theirs = [b for b in base if b.category == category]
    stats = [a.stats for a in mine if a.stats is not None]
    return {
        "speedup": _rate(mine) / _rate(theirs),
        "tokens_per_second": _rate(mine),
        "tokens_per_forward": sum(s.tokens for s in stats) / max(sum(s.forwards for s in stats), 1),
        "identical": sum(a.ids == b.ids for a, b in zip(mine, theirs, strict=True)),
        "questions": len(mine),
    }


def _acceptance(stats: Sequence[Stats]) -> dict[str, dict[int, float]]:
    """By drafter and depth: in which share of all forwards a guess of that drafter was accepted at that depth."""
    forwards = max(sum(s.forwards for s in stats), 1)
    shares: dict[str, dict[int, float]] = {}
    for name in dict.fromkeys(name for s in stats for name in s.accepted):
        depths = sorted({depth for s in stats for depth in s.accepted[name]})
        shares[name] = {d: sum(s.accepted[name][d] for s in stats) / forwards for d in depths}
    return shares


def _reliability(stats: Sequence[Stats]) -> list[dict[str, float]]:
    """By tenth of the claimed chance: guesses below accepted nodes, their mean chance, and the share that came true."""
    tenths = zip(*(s.claims for s in stats), strict=True)
    summed = [[sum(column) for column in zip(*tenth, strict=True)] for tenth in tenths]
    return [{"guesses": n, "claimed": claimed / n, "right": right / n} for n, claimed, right in summed if n]


@torch.no_grad()
def best_two(base: PreTrainedModel, answer: Answered) -> Any:
    """The two best logits `[tokens + 1, 2]` after the prompt and after each token of `answer`, the better first, and
    whose they are, by one forward of `base`."""
    rows = answer.tokens + 1
    ids = torch.tensor([answer.ids], device=base.device)
    return base(input_ids=ids, **only_last(base, rows)).logits[0, -rows:].float().topk(2)


def divergence(mine: Answered, theirs: Answered, best: Callable[[], Any]) -> dict[str, Any] | None:
    """Where two answers part, and how far apart the two best logits are there, which `best` tells as `best_two` of
    `theirs`; None when they are equal."""
    if mine.ids == theirs.ids:
        return None
    shorter = min(len(mine.ids), len(theirs.ids))
    at = next((i for i in range(shorter) if mine.ids[i] != theirs.ids[i]), shorter)
    position = at - theirs.prompt_length
    (better, other), tokens = (told[position].tolist() for told in best())
    return {
        "position": position,
        "gap": better - other,
        "top": tokens,
        "tokens": [theirs.ids[at : at + 1], mine.ids[at : at + 1]],
    }
