"""Forwards recorded before anybody asks for them, so that no answer waits for it.

Knows which sizes a composition may ask for. Does not know how they are recorded.
"""

from __future__ import annotations

from typing import Any

import torch

from .budget import filled
from .cache import commit, recording
from .forward import forward_of
from .recorded import STEPS, recorded_rows, shown_columns
from .tree import TokenTree
from .verify import Context, verify


@torch.no_grad()
def record_ahead(model: Any, tokens: int) -> None:
    """Record verify forwards of all sizes that `model`, whose forwards are recorded and whose budget is known, may ask
    for in sequences of up to `tokens` tokens."""
    most = recorded_rows(model.budget.max_rows)
    ends = {shown_columns(columns) for columns in range(most + 1, tokens + most + 1)}
    for columns in sorted(ends, reverse=True):  # memory that grew later would take what was recorded with it
        _record(model, columns, [rows for rows in STEPS if rows == recorded_rows(rows) <= most])


def _record(model: Any, columns: int, sizes: list[int]) -> None:
    """Forwards of each of the `sizes` that see `columns` columns."""
    plugins, prefixes = model.plugins, model.plugins.prefixes()
    fronts = tuple((prefix.shape[3], source) for source, prefix in prefixes.items())
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or columns
    before = min(columns - sum(front for front, _ in fronts), longest) - max(sizes)
    if before < 1:  # so few positions are left that they are recorded when they are asked for
        return
    cache = filled(model, before)
    visible = torch.ones(before, dtype=torch.bool, device=model.device)
    forward = forward_of(model)
    with recording(cache), forward.laid_out(cache, visible, list(prefixes.values())):
        context = Context.of(visible).behind(fronts)
        told = plugins.forward_kwargs(model), plugins.hidden_layers(model)
        for rows in sizes:
            tree = TokenTree.chain(0, [0] * (rows - 1), [0.0] * (rows - 1))
            verified = verify(forward, cache, context, tree, (), *told)
            commit(cache, verified.rows, [])
