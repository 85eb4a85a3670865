"""The model's own replies to prompts: what every drafter here is trained on.

Knows batched greedy generation and a cache on disk that can be resumed. Does not know what is trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from .identity import weights_digest
from .modes import evaluating
from .storage import write_text

# Of a generation config what a greedy generation does not heed, or is given by the caller.
UNHEEDED = {
    "transformers_version", "_from_model_config", "bos_token_id", "eos_token_id", "pad_token_id", "do_sample",
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "max_length",
    "max_new_tokens", "use_cache", "output_attentions", "output_hidden_states",
}  # fmt: skip

# Of a configuration what no forward heeds, how it came to be, or what the rest of the key tells.
NOT_COMPUTED = {
    "transformers_version", "architectures", "auto_map", "tokenizer_class", "id2label", "label2id", "problem_type",
    "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "return_dict", "output_attentions",
    "output_hidden_states", "output_router_logits", "dtype", "torch_dtype", "attn_implementation",
    "experts_implementation", "quantization_config",
}  # fmt: skip


@dataclass(frozen=True)
class Reply:
    """Token ids of a prompt and of what the model answered."""

    prompt: list[int]
    reply: list[int]

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.reply


def own_replies(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    folder: Path,
    *,
    max_new_tokens: int = 192,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[Reply]:
    """Greedy replies of `model` to `prompts` (token ids), in the order of `prompts`.

    Batches are written to `folder` one file each, under a key of weights, configuration, dtype, length and what else
    decides a greedy generation, so that an interrupted call goes on where it stopped and prompts added later cost only
    themselves. Prompts of like length share a batch.
    """
    cache = folder / _key(model, max_new_tokens)
    known = _known(cache)
    missing = sorted({tuple(ids) for ids in prompts} - known.keys(), key=lambda ids: (len(ids), ids))
    batches = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
    bar = progress or Progress(disable=True)
    with evaluating(model):
        for batch in bar.track(batches, description="own replies"):
            made = list(zip(batch, _generate(model, [list(ids) for ids in batch], max_new_tokens), strict=True))
            text = json.dumps(made)
            write_text(cache / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json", text)
            known |= dict(made)
    return [Reply(list(ids), known[tuple(ids)]) for ids in prompts]


def _known(cache: Path) -> dict[tuple[int, ...], list[int]]:
    """The replies that `cache` holds already, by prompt."""
    known: dict[tuple[int, ...], list[int]] = {}
    for file in sorted(cache.glob("[!.]*.json")):  # the name of one that is being written begins with a dot
        with suppress(ValueError):  # what cannot be read is made again
            known |= {tuple(prompt): reply for prompt, reply in json.loads(file.read_text(encoding="utf-8"))}
    return known


def _key(model: PreTrainedModel, length: int) -> str:
    heeded = _without(UNHEEDED, model.generation_config)
    computed = _without(NOT_COMPUTED, model.config.get_text_config())
    facts = [weights_digest(model), _eos(model), str(model.dtype), length, heeded, computed]
    return hashlib.sha256(json.dumps(facts, default=str, sort_keys=True).encode()).hexdigest()[:16]


def _without(names: Container[str], config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.to_diff_dict().items() if name not in names}


@torch.no_grad()
def _generate(model: Any, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    rows = [torch.tensor(prompt, dtype=torch.long) for prompt in prompts]
    ids, mask = (
        pad_sequence(each, batch_first=True, padding_side="left") for each in (rows, list(map(torch.ones_like, rows)))
    )
    out = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=False,
        pad_token_id=_pad(model),
    )
    return [_until_eos(row, _eos(model)) for row in out[:, ids.shape[1] :].tolist()]


def _eos(model: PreTrainedModel) -> list[int]:
    eos = model.generation_config.eos_token_id
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


def _pad(model: PreTrainedModel) -> int:
    pad = model.generation_config.pad_token_id
    return pad if pad is not None else next(iter(_eos(model)), 0)


def _until_eos(ids: list[int], eos: list[int]) -> list[int]:
    """Cut after the first end-of-sequence token, which belongs to the reply."""
    for at, token in enumerate(ids, 1):
        if token in eos:
            return ids[:at]
    return ids
