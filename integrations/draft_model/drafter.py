"""A smaller causal LM as a drafter: it reads what was accepted, and looks ahead of it.

Knows how many forwards of the draft model a step gets and what each is for. The cache is `reading`, the candidate tree
`growth`, who fits whom `fitting`, files `files`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from ppd_compose import PromptTokens, Step, TokenTree, hookimpl
from ppd_compose.forward import recorder_of
from ppd_compose.hub import PushesToHub
from ppd_compose.recorded import FixedMemories
from ppd_compose.recorders import Recorder
from ppd_compose.replayed import Lending, Lendings, Replayed

from .files import Draft, Origin, is_draft_folder, load_draft, save_draft
from .fitting import compare_vocabularies, refuse_draft
from .growth import Growth
from .reading import ROOT, Reading, best_guesses
from .shared import shared_token, usual_depth


class DraftModel(PushesToHub):
    """Drafter: any smaller causal LM with the base's vocabulary (speculative decoding, arXiv 2211.17192).

    A step looks ahead in `forwards` forwards of the draft model. The first reads what is new and expects the next
    token. Each further one looks at the `width` likeliest guesses that were not looked at, whatever their depth: the
    tree of EAGLE-2 (arXiv 2406.16858, section 4.1), grown at the best nodes of all levels in the place of those of the
    last. With `width` 1 that is the draft model's greedy chain.

    With `n` prompt tokens every forward has them below each node that it looks at. They expect the `n` tokens after the
    node's next one, each on its own, so one forward yields `n + 1` levels (Parallel Prompt Decoding applied to the
    draft model, arXiv 2405.18628). A further forward looks at the `width * (n + 1)` likeliest guesses: what the draft
    model itself expects after a node takes the place of what prompt tokens higher up expected there, and what they
    expect reaches `n + 1` levels further. A draft model that was trained with one shared prompt token (PARD, arXiv
    2504.18583; its configuration names it) gets that token `depth - 1` times and drafts all in one forward.

    Nodes claim what the draft model gives their path. It may be on another device than the base and in another dtype.

    Args:
        model: the draft model, in evaluation mode. Never modified.
        depth: most tokens of a path. None is what a shared prompt token was trained for here, and 4 otherwise.
        width: guesses taken of each next token; 1 drafts a chain.
        prompt_tokens: trained for the draft model itself; they take the place of a shared one.
        forwards: of the draft model in a step. None is `depth`, half of it with prompt tokens, 1 with a shared one.
        tokenizer: the draft model's; with it `compose` sees whether the base's is the same.

    Raises:
        TypeError: `model` is no transformers model.
        ValueError: depth, width or forwards below 1, or a shared prompt token outside the vocabulary.
    """

    name = "draft-model"

    def __init__(
        self,
        model: PreTrainedModel,
        depth: int | None = None,
        width: int = 1,
        prompt_tokens: PromptTokens | None = None,
        forwards: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"a draft model is a transformers model, got {model!r:.60}: use DraftModel.from_pretrained")
        for name, value in (("depth", depth), ("width", width), ("forwards", forwards)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.model, self.depth, self.width = model, depth or usual_depth(model.config), width
        self.prompt_tokens, self.tokenizer, self.shared = prompt_tokens, tokenizer, shared_token(model.config)
        self.n = len(prompt_tokens.embeddings) if prompt_tokens else 0 if self.shared is None else self.depth - 1
        self.follows = False  # to the device of the base
        self._memories, self._lendings = FixedMemories(), Lendings[Replayed]()
        self.origin: Origin | None = None
        self._found: tuple[object, ...] = ()  # what came from there, and how often it was written to
        self.forwards = forwards or self._usual_forwards()
        self.settings = {
            "depth": self.depth, "width": width, "forwards": self.forwards, "dtype": str(model.dtype).split(".")[-1],
        }  # fmt: skip

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        depth: int | None = None,
        width: int = 1,
        prompt_tokens: PromptTokens | None = None,
        forwards: int | None = None,
    ) -> DraftModel:
        """Load a draft model, with its tokenizer and prompt tokens where there are, from a folder or the Hub;
        safetensors only.

        Args:
            source: folder or Hub id.
            revision: branch, tag or commit of a Hub repository.
            token: of the Hub; None takes the one that was stored at login.
            tokenizer: of the draft model, where its folder has none.
            dtype: of the weights; None is that of the files.
            device: where the draft model computes; None is where the base does that it is composed with.
            depth: this and what follows are those of the class.

        Raises:
            FileNotFoundError: no folder or repository, or one without safetensors.
            ValueError: the files are no causal language model.
        """
        found = load_draft(source, revision=revision, token=token, dtype=dtype or "auto")
        model, prompts = found.model.to(device or "cpu"), prompt_tokens or found.prompt_tokens
        drafter = cls(model, depth, width, prompts, forwards, tokenizer or found.tokenizer)
        drafter.follows, drafter.origin = device is None, found.origin
        drafter._found = (model, _writes(model), found.tokenizer)
        return drafter

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the draft model with its tokenizer and prompt tokens; see `files.save_draft` for what is refused.

        Of weights that `from_pretrained` took from the Hub, and that are as they were, only the repository and its
        commit are written.
        """
        as_found = self.origin is not None and self._found[:2] == (self.model, _writes(self.model))
        theirs = as_found and self.tokenizer is self._found[2]
        origin, tokenizer = self.origin if as_found else None, None if theirs else self.tokenizer
        save_draft(Draft(self.model, tokenizer, self.prompt_tokens, origin), Path(folder))

    @staticmethod
    def recognises(config: Mapping[str, Any], files: Collection[str]) -> bool:
        """Whether a folder with this configuration holds a causal language model, and no heads or adapter."""
        return is_draft_folder(config, files)

    @hookimpl
    def prepare(self, model: PreTrainedModel) -> None:
        """Refuse a draft model that cannot look at a tree or reads other tokens than the base."""
        refuse_draft(self.model)
        compare_vocabularies(self.model, model, self.tokenizer)
        if self.prompt_tokens is not None:
            self.prompt_tokens.prepare(self.model)
        if self.follows:
            cast(Any, self.model).to(model.device)

    @hookimpl
    def start(self, step: Step, model: PreTrainedModel) -> None:
        """No token is read yet: the prompt is read with the first draft."""
        prefix = None if self.prompt_tokens is None else self.prompt_tokens.keys_values
        make_recorder = recorder_of(model, self.model)
        lend = make_recorder and partial(_lend, step.ending, self._memories, self.model)
        searching = step.ending.enter_context(self._searching(make_recorder).lent())
        step.memory[self] = Reading(self.model, self._prompts(), step.vocab_size, self.width, prefix, lend, searching)

    @hookimpl
    def propose(self, step: Step) -> TokenTree | None:
        """The likeliest paths below the root."""
        reading: Reading = step.memory[self]
        depth = min(self.depth, step.room - 1, step.budget.max_rows - 1, self._room(step))
        if depth < 1 or max(step.ids[reading.length :]) >= self._embedding().shape[0]:
            return None
        if self.width == 1 and not self.n and reading.at_once:
            return self._chain(step, reading, depth)
        growth = Growth(step.ids[-1], depth, step.budget.max_rows, reading.read(step.ids, min(self.n, depth - 1)))
        for _ in range(self.forwards - 1):
            tokens, parents = growth.pending(self.width * (self.n + 1))
            if not tokens:
                break
            growth.learn(tokens, parents, reading.look(tokens, parents, min(self.n, depth - 2)))
        return growth.tree()

    def _chain(self, step: Step, reading: Reading, depth: int) -> TokenTree:
        """The greedy chain of a device, which goes on by itself."""
        first, *ahead = reading.chain(step.ids, min(self.forwards, depth))
        growth = Growth(step.ids[-1], depth, step.budget.max_rows, first)
        for row, after in enumerate(ahead, ROOT):
            growth.learn([int(first.tokens[0, 0, 0])], [row], after)
            first = after
        return growth.tree()

    def _searching(self, make_recorder: Callable[[], Recorder] | None) -> Lending[Replayed]:
        """`best_guesses` on the draft model's device."""
        device = self.model.device
        ready = partial(Replayed.alone, best_guesses, device, make_recorder, "guesses of a draft model")
        return self._lendings.of(self.model, (device, make_recorder is None), lambda: ready)

    def _usual_forwards(self) -> int:
        if self.prompt_tokens is not None:
            return -(-self.depth // 2)  # prompt tokens guess about every second token, so a forward is worth about two
        return self.depth if self.shared is None else 1

    def _room(self, step: Step) -> int:
        """Tokens that the draft model can expect after the root, as far as its positions go."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return self.depth if positions is None else int(positions) - len(step.ids) + 1

    def _prompts(self) -> Tensor:
        """Prompt tokens `[n, v, hidden]` in the draft model's dtype and on its device."""
        weight = self._embedding()
        if self.prompt_tokens is not None:
            return self.prompt_tokens.embeddings.to(weight)
        if self.shared is None:
            return weight.new_zeros(0, 1, weight.shape[1])
        own: Tensor = self.model.get_input_embeddings()(torch.tensor([self.shared], device=weight.device))
        return own.expand(self.n, 1, -1)

    def _embedding(self) -> Tensor:
        module: Any = self.model.get_input_embeddings()
        weight: Tensor = module.weight
        return weight


def _lend(ending: ExitStack, memories: FixedMemories, model: PreTrainedModel, cache: Cache, visible: Tensor) -> None:
    """Let `cache` lie in memory of `memories` until the sequence ends."""
    ending.enter_context(memories.lent(model, cache, visible, given_back=False))


def _writes(model: PreTrainedModel) -> int:
    return sum(0 if parameter.is_inference() else parameter._version for parameter in model.parameters())
