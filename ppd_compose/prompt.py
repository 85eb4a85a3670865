"""Parallel Prompt Decoding (arXiv 2405.18628): trained prompt tokens below a node guess the tokens after it.

Knows prompt tokens, their ensembles and what they are worth. Does not know how they were trained or stored.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from .accuracy import checked_shares, marginal_gains
from .adapter import Adapter, read_adapter, write_adapter
from .card import model_card
from .device import on_host
from .ensemble import ensemble_parents, guesses
from .forward import recorder_of
from .hookspecs import hookimpl
from .hub import PushesToHub
from .identity import Identity
from .paired import digest_of
from .peft_method import adapter_in
from .prefix import as_prefix, refuse_huge, refuse_prefix
from .reference import is_reference
from .replayed import Lending, Lendings, Replayed
from .step import Answer, Step
from .tree import Appended, Floats, Ints, TokenTree

OTHERS = "train others for it by ppd-compose train ppd"
FEWEST = 4  # candidates that are assumed to be bought when a prompt token's worth is estimated


@dataclass
class Held:
    """What is at hand for one sequence."""

    embeddings: Tensor  # [n * v, hidden], where and of which dtype the model's are
    guessing: Replayed  # `guesses`


class PromptTokens(PushesToHub):
    """Drafter: `n` prompt tokens of `v` embeddings each (ensemble prompt tokens, EPTs; PPD section 3.2).

    Prompt token i below a node stands where the i-th next token would stand and guesses the one after it. The
    distributions of its `v` embeddings are averaged.

    Args:
        embeddings: `[n, v, hidden]`, in the base's space after its embedding layer.
        accuracy: `[n][rank]`, how often the guess of that rank was right on held-out replies. It decides how
            many prompt tokens are worth their rows.
        identity: the base that the embeddings were trained for, checked by `compose`.
        training: how they were trained, as plain data for their files.
        prefix: `[layers, 2, key heads, columns, head_dim]`, keys and values that prompt tokens, and nothing else, see
            before the sequence in every layer of the base that keeps the whole context (prefix tuning, arXiv
            2101.00190, of the prompt tokens' rows alone).

    Raises:
        ValueError: no embeddings, accuracies of another shape or outside 0 to 1, a prefix of another shape, or numbers
            that are not finite or huge.
    """

    name = "ppd"

    def __init__(
        self,
        embeddings: Tensor,
        accuracy: Sequence[Sequence[float]] | None = None,
        identity: Identity | None = None,
        training: Mapping[str, Any] | None = None,
        prefix: Tensor | None = None,
    ) -> None:
        if embeddings.ndim != 3 or 0 in embeddings.shape:
            raise ValueError(f"prompt tokens must be [n, v, hidden] with n, v >= 1, got {tuple(embeddings.shape)}")
        refuse_huge(embeddings, "prompt tokens hold")
        self.embeddings = embeddings.detach()
        self.keys_values = None if prefix is None else as_prefix(prefix)
        self.identity, self.training = identity, dict(training or {})
        n = embeddings.shape[0]
        self.measured = accuracy is not None
        self.accuracy = checked_shares(accuracy if accuracy is not None else [[0.4 * 0.6**i] for i in range(n)], n)
        self._gains: dict[int, Floats] = {}
        self._lendings: Lendings[Replayed] = Lendings()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | nn.Module,
        *,
        revision: str | None = None,
        token: str | None = None,
        subfolder: str = "",
        adapter_name: str | None = None,
    ) -> PromptTokens:
        """Load an adapter; see `adapter.read_adapter` for what is refused.

        Args:
            source: a folder, a Hub id, or a model that PEFT put prompt tokens on.
            revision: branch, tag or commit of a Hub repository.
            token: of the Hub; None takes the one that was stored at login.
            subfolder: of the folder or repository.
            adapter_name: which adapter of a model; None takes the active one.

        Raises `ValueError` also for arguments that mean nothing for that source.
        """
        if isinstance(source, nn.Module):
            if revision or token or subfolder:
                raise ValueError("revision, token and subfolder are of a repository: a model has its adapters at hand")
            adapter = adapter_in(source, adapter_name)
        elif adapter_name is not None:
            raise ValueError("adapter_name is one of a model's: of a folder or repository give the subfolder")
        else:
            adapter = read_adapter(source, revision=revision, token=token, subfolder=subfolder)
        return cls(adapter.embeddings, adapter.accuracy, adapter.identity, adapter.training, adapter.prefix)

    @staticmethod
    def recognises(config: Mapping[str, Any], files: Container[str]) -> bool:
        """Whether a folder with this configuration holds prompt tokens."""
        return config.get("peft_type") == "PPD" or is_reference(config)

    def save_pretrained(self, folder: str | Path, *, results: Sequence[Mapping[str, Any]] = ()) -> None:
        """Write `adapter_config.json`, `adapter_model.safetensors` and a card.

        Args:
            folder: made when it is not there.
            results: of `ppd-compose bench`, told in the card.

        Raises `ValueError` without an identity.
        """
        accuracy = self.accuracy.tolist() if self.measured else None
        adapter = Adapter(self.embeddings, accuracy, self.identity, self.training, self.keys_values)
        write_adapter(adapter, Path(folder), model_card(adapter, results))

    @cached_property
    def digest(self) -> str:
        """Tells these prompt tokens from others by their numbers, whatever their dtype."""
        held = {"embeddings": self.embeddings, "prefix": self.keys_values}
        return digest_of({name: states.float().cpu() for name, states in held.items() if states is not None})

    @hookimpl
    def prepare(self, model: PreTrainedModel) -> None:
        """Refuse a base of another width or with other layers; warn when only its weights differ from those trained
        on."""
        base = Identity.of(model)
        if base.hidden_size != self.embeddings.shape[2]:
            trained = self.identity or f"a base of hidden size {self.embeddings.shape[2]}"
            raise ValueError(f"these prompt tokens were trained for {trained}; they cannot be used on {base}: {OTHERS}")
        if self.keys_values is not None:
            refuse_prefix(self.keys_values, model)
        if self.identity is None:
            return
        if base.vocab_size != self.identity.vocab_size:
            raise ValueError(
                f"these prompt tokens were trained for {self.identity}; they cannot be used on {base}: {OTHERS}"
            )
        self.identity.warn_of_other_weights(base, "these prompt tokens")

    @hookimpl
    def prefix(self) -> Tensor | None:
        """What the prompt tokens see before the sequence."""
        return self.keys_values

    @hookimpl
    def start(self, step: Step, model: PreTrainedModel) -> None:
        """Bring the embeddings to the model's device and dtype once a sequence."""
        weight: Any = model.get_input_embeddings().weight
        guessing = step.ending.enter_context(self._guessing(model).lent())
        step.memory[self] = Held(self.embeddings.flatten(0, 1).to(weight), guessing)

    @hookimpl
    def propose(self, step: Step) -> TokenTree | None:
        """The likeliest paths, every distance guessed on its own."""
        answer = step.answers.get(self)
        if answer is None or not len(answer.kinds):
            return None
        told = step.foretold.get(self) or self._guesses(step, answer)
        log_probs, tokens = (each[: self._distances(answer)[-1] + 1] for each in on_host(*told))
        return TokenTree.product(step.ids[-1], list(tokens), list(log_probs), step.candidates)

    @hookimpl
    def foretell(self, step: Step, answers: Mapping[Any, Answer]) -> tuple[Tensor, ...] | None:
        """What the prompt tokens below a node say, were all of them there. Not of ensembles, whose average is another
        where some are not."""
        answer = answers.get(self)
        return None if answer is None or self.embeddings.shape[1] > 1 else self._guesses(step, answer)

    @hookimpl
    def append(self, step: Step, tree: TokenTree) -> Appended:
        """All prompt tokens below all nodes; a row gains (chance that the node is the last) x (its worth)."""
        (n, v, _), nodes = self.embeddings.shape, len(tree)
        gains = tree.stop_chances()[:, None] * (self.gains(step.rows) / v).repeat(v)
        return Appended(step.memory[self].embeddings, *_below(nodes, n, v), gains.ravel())

    def gains(self, rows: int) -> Floats:
        """Tokens that each prompt token below the last accepted node adds to the next step `[n]`, where the last
        forward had `rows` rows: guesses of far tokens add little where few are verified."""
        nodes = 1 << max(rows, FEWEST).bit_length() - 1
        if nodes not in self._gains:
            self._gains[nodes] = marginal_gains(self.accuracy, nodes)
        return self._gains[nodes]

    def _guesses(self, step: Step, answer: Answer) -> tuple[Tensor, ...]:
        """Log-probabilities and tokens `[distances, WIDTH]`, `for_host`, of what the prompt tokens say."""
        given = [answer.logits] if answer.tokens is None else [answer.logits, answer.tokens]
        guessed: tuple[Tensor, ...] = step.memory[self].guessing(*given, distances=self._distances(answer))
        return guessed

    def _distances(self, answer: Answer) -> tuple[int, ...]:
        """How far each row guesses, 0 the least. A row's parent stands before it, so the rows that the budget left make
        up the first distances."""
        return tuple((answer.kinds // self.embeddings.shape[1]).tolist())

    def _guessing(self, model: PreTrainedModel) -> Lending[Replayed]:
        """`guesses` of what the prompt tokens say in `model`, made once while forwards are computed in the same way."""
        device, make_recorder = model.device, recorder_of(model)
        ready = partial(Replayed.alone, guesses, device, make_recorder, "guesses of prompt tokens")
        return self._lendings.of(model, (device, make_recorder is None), lambda: ready)


@lru_cache
def _below(nodes: int, n: int, v: int) -> tuple[Ints, Ints, Ints]:
    """Embedding, parent and node `[rows]` of each row when all prompt tokens stand below `nodes` nodes; read-only, as
    the next caller gets the same."""
    parents = ensemble_parents(np.arange(nodes), nodes, n, v).ravel()
    columns = np.tile(np.arange(n * v), nodes), parents, np.repeat(np.arange(nodes), n * v)
    for column in columns:
        column.flags.writeable = False
    return columns
