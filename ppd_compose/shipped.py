"""The files that come with the package: prompt tokens for the demonstration's base, and questions.

Knows where they lie. Does not know how they are used.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

ADAPTER = Path(str(files(__package__) / "data" / "ppd-smollm2-135m-instruct"))
QUESTIONS = Path(str(files(__package__) / "data" / "questions.jsonl"))
