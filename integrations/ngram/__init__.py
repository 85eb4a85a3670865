"""An n-gram table as a drafter: counting a model's own replies, drafting from the counts."""

from .drafter import NGramTable
from .table import Table

__all__ = ["NGramTable", "Table"]
