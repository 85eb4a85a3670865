"""Every drafter, every pair and all together: the tokens of the base's own generate, on every family."""

from itertools import combinations, product

import pytest
import torch
from ppd_compose.integrations.draft_model import DraftModel
from ppd_compose.integrations.lookup import PromptLookup
from ppd_compose.integrations.medusa import MedusaHeads
from ppd_compose.integrations.recycling import TokenRecycling
from test_eagle import eagle
from test_medusa import random_heads
from test_ngram import ngram_table
from tiny import FAMILIES, Oracle, prompt, prompt_tokens, tiny

from ppd_compose import compose

MAKERS = {
    "ppd": lambda base: prompt_tokens(),
    "medusa": lambda base: MedusaHeads(random_heads()),
    "eagle": lambda base: eagle(grow=4),
    "draft-model": lambda base: DraftModel(tiny("llama", seed=5, dtype=base.dtype).to(base.device), width=2),
    "lookup": lambda base: PromptLookup(),
    "recycling": lambda base: TokenRecycling(),
    "ngram": lambda base: ngram_table(),
}
LISTINGS = [listing for count in (1, 2, len(MAKERS)) for listing in combinations(MAKERS, count)]


# Each family in one way, two in both; Gemma 2 caps its attention scores, which transformers offers in eager alone.
WAYS = [
    *((family, "sdpa") for family in FAMILIES if family != "gemma2"),
    *product(["gemma2", "llama", "gpt2"], ["eager"]),
]


@pytest.mark.parametrize(("family", "attention"), WAYS)
def test_every_drafter_every_pair_and_all(family, attention):
    base = tiny(family, attention=attention)
    expected = base.generate(prompt(), max_new_tokens=24, do_sample=False)
    answer = Oracle(expected[0].tolist())
    for listing in LISTINGS:
        # The oracle's guesses are taken, so that every drafter's own state is moved on by whole paths.
        model = compose(base, *(MAKERS[name](base) for name in listing), answer, budget=20)
        assert torch.equal(model.generate(prompt(), max_new_tokens=24, do_sample=False), expected), listing
        assert model.stats.forwards < 20, listing


@pytest.mark.parametrize("name", MAKERS)
def test_padding_is_seen_by_no_drafter(name):
    """As many forwards for a padded prompt as for the prompt, and the same tokens."""
    base, told = tiny(), []
    for padding in (0, 5):
        ids = torch.cat([torch.full((1, padding), 0), prompt()], dim=1)
        mask = (torch.arange(ids.shape[1]) >= padding).long()[None]
        model = compose(base, MAKERS[name](base), budget=20)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False, prefill_chunk_size=4)
        told.append((out[0, padding:].tolist(), model.stats.forwards, dict(model.stats.candidates)))
    assert told[0] == told[1]


@pytest.mark.parametrize("name", MAKERS)
def test_sampling_gives_the_same_draws(name):
    base = tiny()
    model = compose(base, MAKERS[name](base), budget=20)
    settings = {"max_new_tokens": 24, "do_sample": True, "temperature": 0.8, "top_p": 0.9}
    told = []
    for each in (base, model):
        torch.manual_seed(3)
        told.append(each.generate(prompt(), **settings))
    assert torch.equal(*told)
