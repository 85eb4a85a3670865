"""The files that come with the package: drafters for the demonstration's base, and questions.

Knows where they lie. Does not know how they are used.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

DATA = Path(str(files(__package__) / "data"))
BASE = "smollm2-135m-instruct"
QUESTIONS = DATA / "questions.jsonl"


def shipped_drafter(name: str) -> Path | None:
    """The folder of the shipped drafter of that name, None when there is none."""
    folder = DATA / f"{name}-{BASE}"
    return folder if name.isidentifier() and folder.is_dir() else None
