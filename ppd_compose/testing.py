"""Is a drafter one that `compose` can trust? The checks that ours pass too.

Knows what every drafter must keep: the tokens of plain decoding, whatever it is composed with and whatever is
rejected, and a base that stays as it was. Does not know how good the guesses are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from .cache import GENERATE_NAME
from .check import MalformedDraft
from .compose import compose
from .hookspecs import hookimpl
from .step import Step
from .tree import TokenTree

NEW_TOKENS = 24
LENGTHS = (1, 9, 40)  # of the prompts


class DrafterFault(AssertionError):
    """A drafter failed a check: which drafter, which check, and what happened."""


class KnowsAnswer:
    """A drafter for checks: paths out of an answer that is known, every third one wrong from its second token on."""

    name = "knows-answer"

    def __init__(self, answer: list[int], vocab_size: int) -> None:
        self.answer, self.vocab_size = answer, vocab_size

    @hookimpl
    def propose(self, step: Step) -> TokenTree | None:
        """Two tokens that are right, or one that is and one that is not."""
        ahead = self.answer[len(step.ids) : len(step.ids) + 2]
        if step.index % 3 == 2:
            ahead = ahead[:1] + [(token + 1) % self.vocab_size for token in ahead[1:]]
        return TokenTree.chain(step.ids[-1], ahead, [-0.2] * len(ahead)) if ahead else None


class _RejectsAll:
    """Accepts the root alone."""

    @hookimpl
    def accept(self, pick: Callable[[int], int]) -> list[tuple[int, int]]:
        return [(0, pick(0))]


class _Watch:
    """Counts the nodes and rows that were offered to `fit`."""

    name = "watch"

    def __init__(self) -> None:
        self.offered = 0

    @hookimpl(tryfirst=True)
    def fit(self, tree: TokenTree, appended: list[Any]) -> None:
        self.offered += len(tree) - 1 + sum(map(len, appended))


def small_base(vocab_size: int = 67, seed: int = 0) -> PreTrainedModel:
    """A random Llama in float64 whose continuations vary, with a vocabulary larger than any tokenizer uses of it."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=160, initializer_range=0.4,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).eval().to(torch.float64)
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None, bos_token_id=1)
    return model  # type: ignore[no-any-return]


def check_drafter(make: Callable[[PreTrainedModel], Any], base: PreTrainedModel | None = None) -> None:
    """Run every check on the drafters that `make(base)` returns; seconds in all.

    Args:
        make: called with the base before every check, returns a new drafter.
        base: the model to decode with, best a small one in float32 or float64; `small_base()` when None.

    Raises:
        DrafterFault: a check failed; the message names the drafter, the check and what happened.
    """
    model: Any = base if base is not None else small_base()
    with torch.no_grad():
        model(_prompt(model, 2), output_hidden_states=True)  # transformers leaves hooks of its own, the first time
    for check in CHECKS:
        before, drafter = _appearance(model), make(model)
        title = f"drafter {getattr(drafter, 'name', type(drafter).__name__)!r}, check {check.__name__[1:]!r}"
        try:
            check(drafter, model)
            _expect(_appearance(model) == before, "an attribute, hook, flag or weight of the base changed")
        except (MalformedDraft, AssertionError) as error:
            raise DrafterFault(f"{title}: {error}") from error
        except Exception as error:  # whatever a drafter raises
            raise DrafterFault(f"{title}: {type(error).__name__}: {error}") from error


def _lossless_alone(drafter: Any, base: Any) -> None:
    for length in LENGTHS:
        _compare(base, compose(base, drafter, budget=16), _prompt(base, length))


def _lossless_with_others(drafter: Any, base: Any) -> None:
    ids = _prompt(base, 9)
    answer = _generate(base, ids)[0].tolist()
    _compare(base, compose(base, drafter, KnowsAnswer(answer, _vocab(base)), budget=24), ids)
    _compare(base, compose(base, KnowsAnswer(answer, _vocab(base)), drafter, budget=24), ids)


def _lossless_when_cut(drafter: Any, base: Any) -> None:
    for rows in (1, 2, 5):
        _compare(base, compose(base, drafter, budget=rows), _prompt(base, 9))


def _lossless_when_all_is_rejected(drafter: Any, base: Any) -> None:
    _compare(base, compose(base, drafter, budget=16, plugins=[_RejectsAll()]), _prompt(base, 9))


def _lossless_when_used_again(drafter: Any, base: Any) -> None:
    model = compose(base, drafter, budget=16)
    for length in (LENGTHS[-1], 3, 9):
        _compare(base, model, _prompt(base, length, seed=length))


def _goes_on_from_a_cache(drafter: Any, base: Any) -> None:
    ids = _prompt(base, 9)
    turn = base.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8,
                         return_dict_in_generate=True)  # fmt: skip
    whole = torch.cat([turn.sequences, _prompt(base, 5, seed=1)], dim=1)
    model, seen = compose(base, drafter, budget=16), torch.ones_like(whole)
    expected = _generate(base, whole)[:, whole.shape[1] :]
    for given in (whole, whole[:, turn.sequences.shape[1] - 1 :]):  # all of the text, and what is not cached
        kept: Any = {GENERATE_NAME: copy.deepcopy(turn[GENERATE_NAME])}
        told = _generate(model, given, attention_mask=seen, **kept)
        _expect_equal(told[:, given.shape[1] :], expected)


def _heeds_padding(drafter: Any, base: Any) -> None:
    ids = torch.nn.functional.pad(_prompt(base, 9), (3, 0))
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    _compare(base, compose(base, drafter, budget=16), ids, attention_mask=mask)


def _stops_inside_a_path(drafter: Any, base: Any) -> None:
    ids = _prompt(base, 9)
    answer = _generate(base, ids)[0].tolist()
    for at in (ids.shape[1] + 1, ids.shape[1] + 6):
        model = compose(base, drafter, KnowsAnswer(answer, _vocab(base)), budget=24)
        _compare(base, model, ids, eos_token_id=answer[at])


def _same_seed_same_tokens(drafter: Any, base: Any) -> None:
    ids, model = _prompt(base, 9), compose(base, drafter, budget=16)
    for seed in (0, 1):
        sampling = {"do_sample": True, "temperature": 0.9, "top_k": 20}
        torch.manual_seed(seed)
        expected = _generate(base, ids, **sampling)
        torch.manual_seed(seed)
        _expect_equal(_generate(model, ids, **sampling), expected)


def _guesses_at_all(drafter: Any, base: Any) -> None:
    watch = _Watch()
    model = compose(base, drafter, budget=16, plugins=[watch])
    for length in LENGTHS:
        _generate(model, _prompt(base, length))
    _expect(watch.offered > 0, "not one node or row in three generations, so that nothing else was checked")


CHECKS: tuple[Callable[[Any, Any], None], ...] = (
    _guesses_at_all, _lossless_alone, _lossless_with_others, _lossless_when_cut, _lossless_when_all_is_rejected,
    _lossless_when_used_again, _goes_on_from_a_cache, _heeds_padding, _stops_inside_a_path, _same_seed_same_tokens,
)  # fmt: skip


def _prompt(base: Any, length: int, seed: int = 0) -> Tensor:
    dice = torch.Generator().manual_seed(seed)
    return torch.randint(2, _vocab(base) - 3, (1, length), generator=dice).to(base.device)


def _vocab(base: Any) -> int:
    return int(base.config.get_text_config().vocab_size)


def _generate(model: Any, ids: Tensor, **settings: Any) -> Tensor:
    mask = torch.ones_like(ids)
    usual = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "return_dict_in_generate": False}
    settings = {**usual, "attention_mask": mask, **settings}
    out: Tensor = model.generate(ids, **settings)
    return out


def _compare(base: Any, model: Any, ids: Tensor, **settings: Any) -> None:
    _expect_equal(_generate(model, ids, **settings), _generate(base, ids, **settings))


def _expect_equal(mine: Tensor, expected: Tensor) -> None:
    ours, theirs = mine[0].tolist(), expected[0].tolist()
    at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(ours))
    _expect(ours == theirs, f"other tokens than plain decoding from position {at}: {ours[at:]} for {theirs[at:]}")


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def _appearance(model: Any) -> dict[str, Any]:
    """All of a model that somebody else might have touched."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        seen[name] = (sorted(vars(module)), module.training, [len(found) for found in hooks])
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        seen[f"{name}!"] = (tensor.data_ptr(), tensor.requires_grad, float(tensor.detach().double().sum()))
    return seen
