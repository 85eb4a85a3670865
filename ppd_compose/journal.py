"""What a benchmark has answered so far, in a file beside its result: a run that was cut off goes on where it stopped.

Knows one line a question and round, and to which run they belong. Does not know how answers are timed.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .bench import Answered, Answers
from .stats import Stats
from .storage import write_text


class Journal:
    """The finished questions of each round of the run that `run` describes, plain data that is another for another run.

    Args:
        path: of the file, which `close` removes; None keeps nothing.

    Raises:
        ValueError: the file is that of another run, or damaged. It stays as it is.
    """

    def __init__(self, path: Path | None, run: Mapping[str, Any]) -> None:
        self.path, self.rounds = path, defaultdict[int, dict[int, Answers]](dict)
        begun = [json.loads(json.dumps(run))]
        if path is not None and path.is_file():
            begun = _lines(path)
            _refuse_others(path, begun[0], json.loads(json.dumps(run)))
            for told in begun[1:]:
                self.rounds[told["round"]][told["question"]] = _answers(told["answers"])
        if path is not None:
            write_text(path, "".join(json.dumps(told) + "\n" for told in begun))  # without a line that was cut off

    def refuse_others(self, questions: Sequence[list[int]]) -> None:
        """Raise `ValueError` where an answer is kept to another than these `questions`, the token ids of each."""
        for number, answers in (kept for finished in self.rounds.values() for kept in finished.items()):
            asked = questions[number] if number < len(questions) else None
            if any(answer.ids[: answer.prompt_length] != asked for answer in answers.values()):
                raise ValueError(
                    f"{self.path} holds an answer to another question {number} than is asked now: later turns follow "
                    "the base's answers, which are others by now. Remove the file to begin anew"
                )

    def keep(self, turn: int, question: int, answers: Answers) -> None:
        """Take up a question that was finished in round `turn`."""
        self.rounds[turn][question] = answers
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"round": turn, **_plain(question, answers)}) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def close(self) -> None:
        """Remove the file, when the result is written that holds it all."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _lines(path: Path) -> list[dict[str, Any]]:
    """All lines but one at the end that was cut off."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")] or [{}]
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it to begin anew") from None


def _refuse_others(path: Path, theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    if theirs != mine:
        other = sorted(name for name in {*theirs, *mine} if theirs.get(name) != mine.get(name))
        raise ValueError(
            f"{path} holds what another run has answered so far ({', '.join(other)} differ): give that command again, "
            "or remove the file to begin anew"
        )


def _plain(question: int, answers: Answers) -> dict[str, Any]:
    told = {
        name: {**vars(answer), "stats": None if answer.stats is None else answer.stats.as_dict()}
        for name, answer in answers.items()
    }
    return {"question": question, "answers": told}


def _answers(told: Mapping[str, Any]) -> Answers:
    return {
        name: Answered(**{**fields, "stats": None if fields["stats"] is None else Stats.of(fields["stats"])})
        for name, fields in told.items()
    }
