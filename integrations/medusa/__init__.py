"""Medusa heads as a drafter: loading every published layout, decoding and training."""

from .choices import MC_SIM_7B_63
from .drafter import MedusaHeads
from .heads import Heads

__all__ = ["MC_SIM_7B_63", "Heads", "MedusaHeads"]
