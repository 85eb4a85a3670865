"""EAGLE-1, EAGLE-2 and EAGLE-3 draft heads: read in all their layouts, drafted with, trained and written."""

from .drafter import EagleHead

__all__ = ["EagleHead"]
