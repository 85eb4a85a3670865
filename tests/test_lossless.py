"""The same tokens as the base's own generate: families, attention kinds, dtypes, prompt tokens, budgets, drafters."""

import pytest
import torch
from tiny import FAMILIES, Oracle, prompt, prompt_tokens, tiny

from ppd_compose import compose

# Gemma 2 caps its attention scores, which transformers offers in eager alone.
PAIRS = [(f, a) for f in FAMILIES for a in ("sdpa", "eager") if (f, a) != ("gemma2", "sdpa")]
SHAPES = [(1, 1, 8), (3, 1, 24), (2, 3, 40), (4, 2, 64)]  # n, v, rows


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("family", "attention"), PAIRS)
def test_greedy_tokens_equal_those_of_generate(family, seed, dtype, attention):
    base = tiny(family, seed=seed, dtype=dtype, attention=attention)
    ids = prompt(9 + 5 * seed, seed)
    expected = base.generate(ids, max_new_tokens=40, do_sample=False)
    for n, v, rows in SHAPES:
        oracle = Oracle(expected[0].tolist())
        model = compose(base, prompt_tokens(n, v), oracle, budget=rows)
        assert torch.equal(model.generate(ids, max_new_tokens=40, do_sample=False), expected), (n, v, rows)
        assert model.stats.forwards < 30  # the oracle's guesses were taken
        assert model.stats.rows_per_forward <= rows


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_prompt_tokens_alone_and_no_drafter_at_all(family):
    base = tiny(family)
    ids = prompt()
    expected = base.generate(ids, max_new_tokens=30, do_sample=False)
    for drafters in ([], [prompt_tokens(3, 2)]):
        model = compose(base, *drafters, budget=16)
        assert torch.equal(model.generate(ids, max_new_tokens=30, do_sample=False), expected)


def test_left_padding_is_not_attended_to():
    base = tiny()
    ids = prompt()
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), torch.ones_like(ids)], dim=1)
    expected = base.generate(padded, attention_mask=mask, max_new_tokens=20, do_sample=False)
    model = compose(base, prompt_tokens(), Oracle(expected[0].tolist()), budget=24)
    assert torch.equal(model.generate(padded, attention_mask=mask, max_new_tokens=20, do_sample=False), expected)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_up_to_the_last_position_of_the_model(family):
    base = tiny(family)
    ids = prompt(150)
    expected = base.generate(ids, max_length=160, do_sample=False)
    model = compose(base, prompt_tokens(4, 2), Oracle(expected[0].tolist(), depth=6), budget=64)
    assert torch.equal(model.generate(ids, max_length=160, do_sample=False), expected)


def test_bfloat16_runs_and_starts_with_the_same_token():
    base = tiny(dtype=torch.bfloat16)
    ids = prompt()
    model = compose(base, prompt_tokens(), budget=16)
    mine, theirs = (m.generate(ids, max_new_tokens=20, do_sample=False) for m in (model, base))
    assert mine.shape == theirs.shape
    assert mine[0, 12] == theirs[0, 12]
