"""The checkpoints of a training: written whole, the newest found again, and removed when they have served.

Knows their folder and what must be the same for a training to go on. Does not know what is trained.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from .paired import writing
from .storage import staged_folder

KEPT = 2  # the newest, and one before it
CUT_OFF = ".step-*"  # what a process that was killed did not write to the end


def checkpoint(accelerator: Accelerator, folder: Path, step: int, facts: Mapping[str, Any]) -> None:
    """Write the checkpoint of `step`, by the main process, and remove older ones and what was cut off; `facts` decide
    what comes out. Raises `OSError` where it cannot be written."""
    target = folder / f"step-{step:06}"
    if accelerator.is_main_process and not target.exists():
        with staged_folder(target) as staging, writing(target):
            accelerator.save_state(str(staging))
            (staging / "recipe.json").write_text(json.dumps(facts), encoding="utf-8")
        for old in [*_in_order(folder)[:-KEPT], *folder.glob(CUT_OFF)]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, folder: Path, facts: Mapping[str, Any]) -> int:
    """Load the newest checkpoint and return its step, else 0. Raises `ValueError` when its `facts` are others."""
    found = _in_order(folder)
    if not found:
        return 0
    if json.loads((found[-1] / "recipe.json").read_text(encoding="utf-8")) != facts:
        raise ValueError(
            f"{found[-1]} was written by another recipe, or with another base, other prompts, another start or another "
            "number of processes: give an empty folder or remove it"
        )
    accelerator.load_state(str(found[-1]))
    return _step_of(found[-1])


def discard(folder: Path) -> None:
    """Remove the checkpoints in `folder`, and it when nothing else is in it; another process may do so meanwhile."""
    for each in [*folder.glob("step-*"), *folder.glob(CUT_OFF)]:
        shutil.rmtree(each, ignore_errors=True)
    with suppress(OSError):
        folder.rmdir()


def _in_order(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the newest last."""
    return sorted(folder.glob("step-*"), key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
