"""What a composed model cannot honour, refused before any forward with the way out.

Knows transformers' generation arguments. Does not decode.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import (  # type: ignore[attr-defined]  # there in every version
    is_deepspeed_zero3_enabled,
    is_fsdp_managed_module,
)

from .cache import GENERATE_NAME, cache_name, refuse_cache

PREPARED = {"attention_mask", "position_ids", GENERATE_NAME, "use_cache", "logits_to_keep"}
NEEDED = {"input_ids", "inputs_embeds", "attention_mask", "position_ids"}
FIRST = 6  # arguments of `generate` that are handed on by their place, itself counted
BASE = "use the base model's own generate for it"


def refuse_base(base: object) -> None:
    """Raise `TypeError` or `ValueError` for a base that cannot be composed."""
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"compose needs a transformers model, got {type(base).__name__}; "
            "of a PeftModel pass get_base_model(), of another wrapper the model inside"
        )
    if not base.can_generate():
        raise ValueError(f"{type(base).__name__} does not generate: load it with AutoModelForCausalLM")
    weight: Any = getattr(base.get_input_embeddings(), "weight", None)
    if isinstance(weight, Tensor) and weight.is_meta:
        raise ValueError(
            f"the weights of this {type(base).__name__} are not in memory (offloaded by device_map, or never loaded): "
            "load it onto one device, in fewer bits where it is too large"
        )
    if base.config.is_encoder_decoder:
        raise ValueError(f"{type(base).__name__} is an encoder-decoder: only decoder-only models can verify a tree")
    if getattr(base.config.get_text_config(), "alibi", False):
        raise ValueError(f"{type(base).__name__} uses ALiBi, which takes no tree mask: no composition is possible")
    _refuse_loops(type(base))
    _refuse_layers(base)
    if missing := sorted({*NEEDED, cache_name(base)} - set(inspect.signature(base.forward).parameters)):
        raise ValueError(
            f"{type(base).__name__}.forward takes no {', '.join(missing)}, which say where the nodes of a tree stand "
            "and what they see: no composition is possible"
        )


def _refuse_loops(kind: Any) -> None:
    """Raise `ValueError` for a class that decodes by a loop of its own, or prepares it by arguments of its own."""
    usual: Any = GenerationMixin
    given, taken = (list(inspect.signature(of.generate).parameters) for of in (kind, usual))
    passed_on = set(given) <= {"self", "args", "kwargs"}
    if kind._sample is not usual._sample or not (passed_on or given[:FIRST] == taken[:FIRST]):
        raise ValueError(
            f"{kind.__name__} generates by a loop or by arguments of its own, which a composed model would pass by: no "
            "composition is possible"
        )


def refuse_wrapper(model: object) -> None:
    """Raise `ValueError` for a composed model around which PEFT put prompt learning, which adds to every forward of
    plain decoding what those of trees would lack."""
    patched = vars(model).get("prepare_inputs_for_generation")
    own = type(model).prepare_inputs_for_generation  # type: ignore[attr-defined]
    if patched is not None and getattr(patched, "__func__", None) is not own:
        raise ValueError(
            "what this model does before a forward was replaced, as PEFT does for prompt and prefix tuning; those "
            f"of candidate trees would lack it: {BASE}"
        )


def _refuse_layers(base: PreTrainedModel) -> None:
    text = base.config.get_text_config()
    if "chunked_attention" in (getattr(text, "layer_types", None) or ()):
        raise ValueError(
            f"{type(base).__name__} attends within chunks of the text, which a tree may straddle: no composition is "
            "possible"
        )
    if getattr(text, "hidden_size_per_layer_input", None):
        raise ValueError(
            f"{type(base).__name__} embeds every token once more for each layer, which rows with embeddings of their "
            "own lack: no composition is possible"
        )
    if any(_is_mask(buffer) for buffer in base.buffers()):
        raise ValueError(
            f"{type(base).__name__} has a causal mask of its own, which tells rows by their place in a forward and not "
            "by their position: no composition is possible"
        )
    split = (getattr(base, "_tp_size", None) or 1) > 1
    if split or is_fsdp_managed_module(base) or is_deepspeed_zero3_enabled():
        raise ValueError(
            f"this {type(base).__name__} is split over processes, each of which would time its forwards and choose its "
            "rows for itself: load it whole, without tp_plan, FSDP or ZeRO-3"
        )


def _is_mask(buffer: Tensor) -> bool:
    """Whether it is shaped as attention reads a mask, `[1, 1, positions, positions]`."""
    return buffer.dtype == torch.bool and buffer.ndim == 4 and buffer.shape[-1] == buffer.shape[-2] > 1


def refuse_arguments(kwargs: dict[str, Any], *configs: GenerationConfig | None) -> None:
    """Raise `ValueError` for keyword arguments of `generate`, or what `configs` say where those are silent, the first
    one first, that have no meaning for a candidate tree."""
    if kwargs.get("assistant_model") is not None or kwargs.get("prompt_lookup_num_tokens"):
        raise ValueError("a composed model drafts itself: pass the other drafter to compose() instead")
    if kwargs.get("custom_generate") is not None:
        raise ValueError(f"custom_generate replaces the loop that a composed model is: {BASE}")
    if kwargs.get("inputs_embeds") is not None:
        raise ValueError(f"a composed model decodes token ids, not inputs_embeds: {BASE}")
    _refuse_positions(kwargs.get("position_ids"), kwargs.get("attention_mask"))
    healing = [kwargs.get("token_healing"), *(config.token_healing for config in configs if config is not None)]
    if next((told for told in healing if told is not None), False):
        raise ValueError("token_healing changes the prompt: pass what the base's heal_tokens(ids, tokenizer) returns")
    if kwargs.get("synced_gpus"):
        raise ValueError(f"synced_gpus is not supported, as processes would stop in different steps: {BASE}")
    if kwargs.get("cache_implementation") == "paged":
        raise ValueError(f"continuous batching has its own loop: {BASE}")
    for name in ("assistant_model", "custom_generate", "inputs_embeds", "position_ids", "synced_gpus"):
        kwargs.pop(name, None)


def _refuse_positions(places: Any, mask: Any) -> None:
    """Where `places` `[..., tokens]` are others than `mask` `[..., tokens or more]` says, from which a composition
    counts them."""
    if places is None:
        return
    seen = torch.ones_like(places) if mask is None else mask
    new = seen[..., -places.shape[-1] :].bool()
    counted = (seen.cumsum(-1) - 1)[..., -places.shape[-1] :]
    if new.shape != places.shape or bool(((places != counted) & new).any()):
        raise ValueError("position_ids follow from attention_mask here, and these are others: pass that alone")


def refuse_request(
    model: PreTrainedModel,
    input_ids: Tensor,
    visible: Tensor,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> None:
    """Raise `ValueError` for what shows only once `generate` has prepared everything; `visible` as of
    `generation.visible_columns`."""
    _refuse_mode(config)
    if config.use_cache is False:
        raise ValueError(f"use_cache=False leaves nothing to verify a tree against: leave it unset, or {BASE}")
    _refuse_input(model, input_ids, visible, config, model_kwargs.get(GENERATE_NAME))
    refuse_cache(model_kwargs.get(GENERATE_NAME), model)
    # Where a model takes images too, `generate` tells that there are none.
    given = {name: value for name, value in model_kwargs.items() if value is not None and not _is_empty(value)}
    if unknown := sorted(given.keys() - PREPARED):
        raise ValueError(f"a composed model does not pass {', '.join(unknown)} to the forward: {BASE}")


def _is_empty(value: object) -> bool:
    return isinstance(value, dict | list | tuple) and not value


def _refuse_mode(config: GenerationConfig) -> None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"{mode.value.replace('_', ' ')} has no exact form over a tree, only greedy search and "
            f"sampling have: {BASE}"
        )
    if config.output_attentions or config.output_hidden_states:
        raise ValueError(f"output_attentions and output_hidden_states are not collected over a tree: {BASE}")


def _refuse_input(
    model: PreTrainedModel, input_ids: Tensor, visible: Tensor, config: GenerationConfig, cache: Any
) -> None:
    if input_ids.shape[0] != 1:
        raise ValueError(
            f"got {input_ids.shape[0]} sequences (num_return_sequences counts): one sequence per call for now, "
            "so call generate in a loop, or use the base model's own generate for a batch"
        )
    if input_ids.shape[1] == 0:
        raise ValueError("the prompt is empty: give at least one token, such as the tokenizer's bos_token_id")
    cached = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
    if not 0 < len(visible) - cached <= input_ids.shape[1]:
        raise ValueError(
            f"{GENERATE_NAME} holds {cached} tokens, the prompt {input_ids.shape[1]}: pass the whole sequence with at "
            "least one token that is not cached, or the new tokens with an attention_mask for the whole sequence"
        )
    if not visible[-1]:
        raise ValueError("the prompt ends in padding, which a text cannot go on from: pad on the left, or not at all")
    tokens = int(visible.sum())
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise ValueError(f"the prompt has {tokens} tokens, {type(model).__name__} takes {positions}: shorten it")
    _refuse_long_rope(model, cached, tokens, tokens + (config.max_length or 2**31) - input_ids.shape[1])


def _refuse_long_rope(model: PreTrainedModel, cached: int, tokens: int, longest: int) -> None:
    """Where a text of `tokens`, of which some may be `cached`, grows past the length up to which the model turns its
    keys by other factors."""
    told: Any = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    for rope in [told] if "rope_type" in told else [rope for rope in told.values() if isinstance(rope, dict)]:
        before = rope.get("original_max_position_embeddings")
        if rope.get("rope_type") != "longrope" or before is None:
            continue
        if tokens <= before < longest - 1 or 0 < cached <= before < tokens:
            raise ValueError(
                f"{type(model).__name__} changes its rotary factors behind {before} tokens, which makes all that is "
                f"cached wrong; prompt and answer may reach {longest}: lower max_new_tokens, or {BASE}"
            )
