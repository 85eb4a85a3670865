"""Modules as somebody else needs them: in evaluation mode for a while, or as copies over the same parameters.

Knows modules. Does not know what is computed with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode; afterwards every module as it was."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


def beside(module: nn.Module, **changed: Any) -> Any:
    """A copy of `module` that holds the same things but those `changed`: parameters, hooks and what is in it."""
    made = object.__new__(type(module))
    made.__dict__.update(vars(module), **changed)
    return made
