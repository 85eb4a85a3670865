"""What a benchmark has answered so far, in a file beside its result: a run that was cut off goes on where it stopped.

Knows one line a question, and to which run they belong. Does not know how answers are timed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .bench import Answered, Answers
from .stats import Stats


class Journal:
    """The finished questions of the run that `run` describes, plain data that is another for another run.

    Args:
        path: of the file, which `close` removes; None keeps nothing.
    """

    def __init__(self, path: Path | None, run: Mapping[str, Any]) -> None:
        self.path, self.run = path, json.loads(json.dumps(run))
        self.answers: dict[int, Answers] = {}
        if path is None:
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        whole = [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be cut off
        if whole and whole[0] == self.run:
            self.answers = {told["question"]: _answers(told["answers"]) for told in whole[1:]}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")
        self._write(self.run)
        for question, answers in self.answers.items():
            self._write(_plain(question, answers))

    def keep(self, question: int, answers: Answers) -> None:
        """Take up a finished question."""
        self.answers[question] = answers
        self._write(_plain(question, answers))

    def close(self) -> None:
        """Remove the file: the result holds it all."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _write(self, told: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(told) + "\n")
            file.flush()
            os.fsync(file.fileno())


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
