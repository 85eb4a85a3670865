"""`generate` of a composed model: transformers prepares, the loop decodes.

Knows what transformers hands to a custom loop and what it drops on the way. Does not know what a step is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import MaxTimeCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .accept import Picker
from .budget import Budget
from .cache import GENERATE_NAME
from .decode import Decoding, Request
from .evidence import Evidence
from .followed import Apart, Followed
from .forward import Forward
from .mask import refuse_attention
from .measured import Watch, measured_budget
from .plugins import Plugins
from .positions import first_position
from .refuse import refuse_arguments, refuse_request, refuse_wrapper
from .saved import save_composition
from .stats import Stats
from .storage import write_text


class Composed:
    """What `compose` adds to the base's class."""

    device: torch.device
    forwards: Forward
    plugins: Plugins
    budget: Budget | None
    watch: Watch | None
    stats: Stats
    followed: Followed | Apart
    generation_config: GenerationConfig

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A model of the base's own class, as of `type(model).from_pretrained(...)`: only `compose` composes."""
        return next(kind for kind in cls.__mro__ if not issubclass(kind, Composed))(*args, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        streamer: BaseStreamer | None = None,
        *,
        generator: torch.Generator | None = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Generate as the base's own `generate`, which see: the same arguments and the same tokens.

        Args:
            generator: source of the draws of sampling; None takes torch's global one, as `generate` does.

        Raises:
            ValueError: something that a candidate tree cannot honour, before any forward, and what to use instead.
            MalformedDraft: a drafter returned what is no candidate tree; what was generated until then is lost.
        """
        try:
            self.followed.take_up(self)
            refuse_attention(self)  # type: ignore[arg-type]
            refuse_wrapper(self)
            kwargs |= {"synced_gpus": synced_gpus, "assistant_model": assistant_model}
            refuse_arguments(kwargs, generation_config, self.generation_config)
            return super().generate(  # type: ignore[misc,no-any-return]
                inputs,
                generation_config,
                logits_processor,
                _Criteria(stopping_criteria or [], tokenizer),
                prefix_allowed_tokens_fn,
                custom_generate=_loop(streamer, generator),
                **kwargs,
            )
        finally:
            if streamer is not None:
                streamer.end()

    def __reduce__(self) -> Any:
        raise TypeError(
            f"a composed {type(self).__name__} shares its base's weights and can be neither copied nor pickled: copy "
            "or save the base, and compose it again; save_composition keeps the drafters"
        )

    def warmup(self) -> float:
        """Measure the budget and compile what will be compiled, so that later calls of `generate` need not wait: the
        seconds that it took, some minutes where nothing of it was done before on this machine."""
        begin, ids = time.perf_counter(), torch.zeros(1, 19, dtype=torch.long, device=self.device)
        self.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, min_new_tokens=12, do_sample=False)
        return time.perf_counter() - begin

    def save_composition(self, folder: str | Path) -> None:
        """Write which drafters are composed, with their files and what was learnt, for `compose_from_pretrained`; see
        `saved.save_composition` for what is refused."""
        save_composition(self, folder)

    def save_calibration(self, path: str | Path) -> None:
        """Write how far the drafters' claims can be believed, as learnt so far: for `compose(..., calibration=path)`.

        Holds a few numbers for each drafter, and nothing of what was decoded.
        """
        evidence: Any = self.plugins.manager.get_plugin(Evidence.name)
        write_text(Path(path), json.dumps(evidence.learnt()) + "\n")

    def _get_stopping_criteria(
        self, generation_config: GenerationConfig, stopping_criteria: StoppingCriteriaList, tokenizer: Any = None
    ) -> StoppingCriteriaList:
        # On its way to a custom loop transformers drops the tokenizer that stop strings need.
        return super()._get_stopping_criteria(  # type: ignore[misc, no-any-return]
            generation_config, stopping_criteria, getattr(stopping_criteria, "tokenizer", None) or tokenizer
        )


class _Criteria(StoppingCriteriaList):
    """The user's stopping criteria, and the tokenizer for stop strings."""

    def __init__(self, criteria: Any, tokenizer: Any) -> None:
        super().__init__(criteria)
        self.tokenizer = tokenizer


def _loop(streamer: BaseStreamer | None, generator: torch.Generator | None) -> Callable[..., Any]:
    """The callable that `generate(custom_generate=...)` calls with all that it has prepared."""

    def decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        visible = visible_columns(input_ids, generation_config, model_kwargs)
        refuse_request(model, input_ids, visible, generation_config, model_kwargs)
        picker = _picker(logits_processor, generation_config, generator)
        request = _request(
            model, input_ids, visible, picker, stopping_criteria, streamer, generation_config, model_kwargs
        )
        if streamer is not None:
            streamer.put(input_ids.cpu())
        # Read once, as another thread may put its own there at any moment.
        stats = model.stats = Stats(tuple(model.plugins.drafters))
        sequences = Decoding(model, model.plugins, stats, request).run()
        if not generation_config.return_dict_in_generate:
            return sequences
        return _output(sequences, picker, request)

    return decode


def _picker(processors: LogitsProcessorList, config: GenerationConfig, generator: torch.Generator | None) -> Picker:
    scores, logits = (
        bool(config.return_dict_in_generate and wanted) for wanted in (config.output_scores, config.output_logits)
    )
    return Picker(processors, bool(config.do_sample), generator, scores, logits)


def _request(
    model: Any,
    input_ids: Tensor,
    visible: Tensor,
    picker: Picker,
    criteria: StoppingCriteriaList,
    streamer: BaseStreamer | None,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> Request:
    """Bring together what `generate` prepared; the budget is measured here, the first time."""
    cache = model_kwargs[GENERATE_NAME]
    cached = int(cache.get_seq_length())
    first = first_position(model, input_ids, visible, cached, model_kwargs)
    if model.budget is None:
        begin = time.time()
        model.budget = measured_budget(model)
        _restart(criteria, time.time() - begin)
    elif model.watch is not None:
        model.budget = model.watch.kept_true(model, model.budget)
    return Request(
        ids=input_ids,
        cache=cache,
        visible=visible,
        cached=cached,
        picker=picker,
        criteria=criteria,
        streamer=streamer,
        chunk=config.prefill_chunk_size,
        budget=model.budget,
        room=room(model, input_ids, first + int(visible.sum()), config),
        first=first,
    )


def _restart(criteria: StoppingCriteriaList, seconds: float) -> None:
    """Let the time that an answer may take begin `seconds` later."""
    for criterion in criteria:
        if isinstance(criterion, MaxTimeCriteria):
            criterion.initial_timestamp += seconds


def visible_columns(input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]) -> Tensor:
    """Bool `[cached + new tokens]` on the host, False for padding.

    `generate` drops a mask of ones and keeps its length. With a filled cache, `input_ids` may be the whole
    sequence or the new tokens alone; the mask always covers the whole.
    """
    mask = model_kwargs.get("attention_mask")
    if mask is not None:
        return cast(Tensor, mask[0].bool().cpu())
    return torch.ones(getattr(config, "_mask_length", input_ids.shape[1]), dtype=torch.bool, device="cpu")


def room(model: PreTrainedModel, input_ids: Tensor, tokens: int, config: GenerationConfig) -> int:
    """How many tokens may be drafted for: up to `max_length`, and to the last position that the model has.

    Args:
        tokens: positions of those that are there, padding left out.
    """
    limits = [] if config.max_length is None else [config.max_length - input_ids.shape[1]]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None:
        limits.append(positions - tokens + 1)
    return min(limits) if limits else tokens + 2**31


def _output(sequences: Tensor, picker: Picker, request: Request) -> GenerateDecoderOnlyOutput:
    return GenerateDecoderOnlyOutput(
        sequences=cast(torch.LongTensor, sequences),
        scores=cast(Any, tuple(picker.scores)) if picker.keeps_scores else None,
        logits=cast(Any, tuple(picker.logits)) if picker.keeps_logits else None,
        **cast(Any, {GENERATE_NAME: request.cache}),
    )
