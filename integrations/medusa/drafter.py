"""Medusa (arXiv 2401.10774) as a drafter: every head guesses the token at its own distance from one hidden state.

Knows the hooks and what to refuse. The heads themselves are `heads`, their files `files`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from ppd_compose import PromptTokens, Step, TokenTree, hookimpl
from ppd_compose.accuracy import checked_shares
from ppd_compose.device import on_host
from ppd_compose.finish import OutputHead, output_head, refuse_other_logits
from ppd_compose.hub import PushesToHub
from ppd_compose.identity import Identity
from ppd_compose.step import Answer, Reached
from ppd_compose.tree import Ints

from .choices import Choices
from .claims import calibrated, checked
from .files import Stored, read_folder, recognises, write_folder
from .heads import Heads
from .layouts import LAYOUTS
from .prompt_heads import PromptHeads, by_distance
from .running import Held, Ready

WIDTH = 10  # guesses taken from each head


class MedusaHeads(PushesToHub):
    """Drafter: after the last accepted token, head k guesses the token k after the next one, which is the root.

    The heads run once a step, on one hidden state, in the base's dtype and on its device. Nothing is put on the base.

    Args:
        heads: their tensors.
        choices: a static tree as paths of ranks, in Medusa's form (section 2.3.3); None takes, anew at each step,
            the likeliest paths when every distance is guessed on its own.
        accuracy: `[head][rank]`, how often the guess of that rank was right on held-out replies. It is kept and
            shown, and decides nothing.
        calibration: `[head]` pairs of an offset and a slope by which claims hold on held-out replies; None takes what
            the heads say. See `claims.calibrated`.
        identity: the base that the heads were trained for, checked by `compose`.
        base_name: its name, where no more is known.
        training: how they were trained, as plain data.
        prompt_heads: heads that tell better what the prompt tokens say that they were trained beside, where these are
            composed too.

    Raises:
        ValueError: prompt heads of another width, choices that are no tree or deeper than there are heads, or
            accuracies or a calibration of another shape.
    """

    name = "medusa"

    def __init__(
        self,
        heads: Heads,
        *,
        choices: Sequence[Sequence[int]] | None = None,
        accuracy: Sequence[Sequence[float]] | None = None,
        calibration: Sequence[Sequence[float]] | None = None,
        identity: Identity | None = None,
        base_name: str = "",
        training: Mapping[str, Any] | None = None,
        prompt_heads: PromptHeads | None = None,
    ) -> None:
        self.heads = heads if identity is None else replace(heads, vocab_size=identity.vocab_size)
        self.choices = None if choices is None else Choices.of(choices, len(heads))
        self.width = WIDTH if self.choices is None else self.choices.width  # guesses taken from each head
        self.settings = {"choices": None if choices is None else [list(path) for path in choices]}
        self.identity, self.base_name = identity, identity.name if identity else base_name
        self.training = dict(training or {})
        self.accuracy = None if accuracy is None else checked_shares(accuracy, len(heads))
        self.calibration = None if calibration is None else checked(calibration, len(heads))
        if prompt_heads is not None and prompt_heads.hidden_size != heads.hidden_size:
            raise ValueError(f"prompt heads of {prompt_heads.hidden_size} numbers beside heads of {heads.hidden_size}")
        self.prompt_heads = prompt_heads
        # A calibration holds for the guesses by which it was found, so no fewer are looked at.
        self._ready = Ready(self.heads, prompt_heads, max(self.width, WIDTH))

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        choices: Sequence[Sequence[int]] | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> MedusaHeads:
        """Load heads of any published layout from a folder or the Hub; see `files.read_folder` for what is refused.

        A Medusa-2 checkpoint holds its own fine-tuned base: load the base from the same place.
        """
        stored = read_folder(source, revision=revision, token=token)
        own = dict(stored.own)
        try:
            identity = Identity(**own["base"]) if own.get("base") else None
            return cls(
                stored.heads, choices=choices, accuracy=own.get("accuracy"), calibration=own.get("calibration"),
                identity=identity, base_name=stored.base_name, training=own.get("training"),
                prompt_heads=stored.prompt_heads,
            )  # fmt: skip
        except (TypeError, OverflowError) as error:
            raise ValueError(f"{source}: the config lacks a field of its base or has one too many: {error}") from None

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        layout: str = "official",
        dtype: torch.dtype | None = None,
        base: PreTrainedModel | None = None,
        card: str = "",
    ) -> None:
        """Write config and tensors.

        Args:
            layout: "official" (`medusa_lm_head.safetensors`, "version" 2 where the base's output head is used), or
                "vllm" (`model.safetensors`).
            dtype: of the tensors; None keeps theirs.
            base: whose output head is stored with heads that use it; vLLM's layout needs that.
            card: text of a README.md beside.

        Raises:
            ValueError: an unknown layout, vLLM's without output heads or a vocabulary, or a base that biases or caps.
        """
        if layout not in LAYOUTS:
            raise ValueError(f"layout {layout!r} is unknown: take one of {', '.join(LAYOUTS)}")
        heads = self.heads
        if base is not None and not heads.outputs:
            rows = OutputHead.of(base, heads.token_map).matrix()
            heads = replace(heads, outputs=(rows,), vocab_size=Identity.of(base).vocab_size)
        if layout == "vllm" and (not heads.outputs or heads.vocabulary is None):
            raise ValueError("vLLM's layout stores output heads and the vocabulary's size: give base=, the base model")
        if dtype is not None:
            heads = heads.to(torch.empty(0, dtype=dtype))
        own = {
            "base": None if self.identity is None else asdict(self.identity),
            "accuracy": None if self.accuracy is None else self.accuracy.tolist(),
            "calibration": None if self.calibration is None else self.calibration.tolist(),
            "training": self.training,
        }
        write_folder(Stored(heads, self.base_name, own, self.prompt_heads), Path(folder), layout, card)

    @staticmethod
    def recognises(config: Mapping[str, Any], files: set[str]) -> bool:
        """Does a folder with this `config.json` (or {}) and these file names hold Medusa heads?"""
        return recognises(config, files)

    @hookimpl
    def prepare(self, model: PreTrainedModel) -> None:
        """Refuse a base of another width or vocabulary; warn when only its weights differ from those trained on."""
        base, heads = Identity.of(model), self.heads
        width: int = output_head(model).weight.shape[1]
        trained = self.identity or f"{self.base_name or 'a base'} of hidden size {heads.hidden_size}"
        if width != heads.hidden_size:
            raise ValueError(
                f"these Medusa heads were trained for {trained}; they cannot be used on {base}, whose last hidden "
                f"states have {width} numbers"
            )
        needed = heads.vocabulary or (0 if heads.token_map is None else int(heads.token_map.max()) + 1)
        if needed > base.vocab_size or heads.vocabulary not in (None, base.vocab_size):
            raise ValueError(
                f"these Medusa heads were trained for {trained} and a vocabulary of {needed}; they cannot be used on "
                f"{base}"
            )
        entries = heads.entries or base.vocab_size
        if self.choices is not None and self.choices.width > entries:
            raise ValueError(f"choices name rank {self.choices.width - 1}, the heads choose from {entries} tokens")
        if not heads.outputs or self.prompt_heads is not None:
            refuse_other_logits(model)
        if self.identity is not None:
            self.identity.warn_of_other_weights(base, "these Medusa heads")

    @hookimpl
    def hidden_layers(self, model: PreTrainedModel) -> list[int]:
        """The last one, which is normalised."""
        return [model.config.get_text_config().num_hidden_layers]

    @hookimpl
    def start(self, step: Step, model: PreTrainedModel) -> None:
        """Bring the heads to the model's device and dtype."""
        (layer,) = self.hidden_layers(model)
        step.memory[self] = Held(layer, step.ending.enter_context(self._ready.beside(model).lent()))

    @hookimpl
    def refine(self, step: Step, drafter: Any, answer: Answer, reached: Reached) -> Answer | None:
        """What prompt tokens say, by their states, that of the last token and the root, where these heads were trained
        beside them."""
        heads = self.prompt_heads
        if heads is None or not self._reads(drafter):
            return None
        held = step.memory[self]
        v = drafter.embeddings.shape[1]
        states = by_distance(answer.hidden_states[held.layer], answer.kinds // v)[: len(heads)]
        (logits,) = held.running.reread(states, reached.hidden_states[held.layer], reached.root)
        return Answer(v * np.arange(len(states)), logits, {}, held.running.token_map)

    @hookimpl
    def propose(self, step: Step) -> TokenTree | None:
        """The static tree, or the likeliest paths when every distance is guessed on its own. None where prompt tokens
        are told better: that is known of more, and said once."""
        if any(self._reads(drafter) for drafter, answer in step.answers.items() if len(answer.kinds)):
            return None
        held = step.memory[self]
        told = step.foretold.get(self) or held.running.guesses(step.hidden_states[held.layer][-1:])
        log_probs, tokens = self._claimed(*on_host(*told))
        if self.choices is not None:
            return self.choices.tree(step.ids[-1], tokens, log_probs)
        return TokenTree.product(step.ids[-1], list(tokens), list(log_probs), step.candidates)

    @hookimpl
    def foretell(self, step: Step, reached: Reached, answers: Mapping[Any, Answer]) -> tuple[Tensor, ...] | None:
        """What the heads guess, where they guessed at this step and read no prompt tokens at the next."""
        if self.name not in step.drafting or any(map(self._reads, answers)):
            return None
        held: Held = step.memory[self]
        return held.running.guesses(reached.hidden_states[held.layer])

    def _claimed(self, told: NDArray[np.float32], tokens: Ints) -> tuple[NDArray[np.floating], Ints]:
        """Logarithms of chances and tokens `[heads, rank]`, the best first, of what the heads told."""
        claims = told if self.calibration is None else calibrated(told, self.calibration)
        return claims[:, : self.width], tokens[:, : self.width]

    def _reads(self, drafter: Any) -> bool:
        """Whether these heads tell better what that drafter's rows say."""
        heads = self.prompt_heads
        return heads is not None and isinstance(drafter, PromptTokens) and drafter.digest == heads.prompt_tokens
