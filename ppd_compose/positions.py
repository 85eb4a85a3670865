"""Where the tokens of a sequence stand, as the model's own `generate` places them.

Knows how transformers prepares a forward. Does not know trees.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel

from .refuse import BASE


def first_position(
    model: PreTrainedModel, input_ids: Tensor, visible: Tensor, cached: int, prepared: dict[str, Any]
) -> int:
    """The position of the first token, where all that are no padding stand one behind the other; 0 with most models.

    Args:
        visible: bool `[cached + new tokens]`, False for padding.
        cached: tokens that are in the KV cache.
        prepared: what `generate` would give to each forward.

    Raises `ValueError` where tokens stand otherwise, as behind images, or where nobody but the forward knows.
    """
    name, places = type(model).__name__, _places(model, input_ids, len(visible) - cached, prepared)
    if places is None:
        return _first_column(model, visible, cached)
    new = visible[cached:]
    counted = (visible.cumsum(0) - 1)[cached:][new]
    shift = places[..., -len(new) :].cpu()[..., new] - counted
    first = int(shift.flatten()[-1])
    if bool((shift != first).any()):
        raise ValueError(
            f"{name} places the last token at {places[..., -1].unique().tolist()}, behind {int(counted[-1])} others, "
            "and not all one behind the other: after images, say, whose positions a candidate tree does not know: "
            f"{BASE}"
        )
    return first


def _first_column(model: Any, visible: Tensor, cached: int) -> int:
    """The same where `generate` leaves it to the forward, which counts columns, padding too."""
    first = int(visible.int().argmax())
    # A class that takes positions away, and turns no keys by them, may count from anywhere: 2, say, behind nothing.
    counts = not _prepares(model) or getattr(model.config.get_text_config(), "rope_parameters", None)
    if bool(visible[first:].all()) and (counts or not first + cached):
        return first
    raise ValueError(
        f"{type(model).__name__} places tokens by itself, in a way that a candidate tree does not know where there is "
        f"padding or a cache: {BASE}"
    )


def _places(model: Any, input_ids: Tensor, new: int, prepared: dict[str, Any]) -> Tensor | None:
    """Position ids `[..., new tokens or more]` of a prefill; None where none are given."""
    if _prepares(model):
        prepared = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=new, is_first_iteration=True, **prepared
        )
    places: Tensor | None = prepared.get("position_ids")
    return places


def _prepares(model: Any) -> bool:
    """Whether the class of `model` has a way of its own to prepare a forward."""
    usual: Any = GenerationMixin.prepare_inputs_for_generation
    return type(model).prepare_inputs_for_generation is not usual
