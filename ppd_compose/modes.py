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
    """A shallow copy of `module`: the same parameters, hooks and submodules, but for the attributes in `changed`."""
    made = object.__new__(type(module))
    made.__dict__.update(vars(module), **changed)
    return made
