"""Draft models: a smaller causal LM guesses what the base will write, in one forward a token or, trained for it, in one
forward for all of them."""

from .drafter import DraftModel

__all__ = ["DraftModel"]
