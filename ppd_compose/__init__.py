"""Composable speculative decoding for Hugging Face causal LMs: `model = compose(base, medusa, ppd)`."""

from .budget import Budget
from .check import MalformedDraft
from .compose import compose
from .drafters import load_drafter
from .hookspecs import hookimpl
from .peft_method import PPDConfig
from .prompt import PromptTokens
from .reopened import compose_from_pretrained
from .stats import Stats
from .step import Answer, Step
from .tree import Appended, TokenTree

__all__ = [
    "Answer",
    "Appended",
    "Budget",
    "MalformedDraft",
    "PPDConfig",
    "PromptTokens",
    "Stats",
    "Step",
    "TokenTree",
    "compose",
    "compose_from_pretrained",
    "hookimpl",
    "load_drafter",
]
