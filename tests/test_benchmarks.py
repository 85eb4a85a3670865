"""Benchmarks that decode run on a small model, and their figures are those of the decoding."""

import composition
import pytest
import sweep
from ppd_compose.integrations.lookup import PromptLookup
from ppd_compose.integrations.recycling import TokenRecycling
from tiny import prompt, prompt_tokens, tiny

from ppd_compose import Budget
from ppd_compose.bench import Question

MAKERS = {"ppd": prompt_tokens, "lookup": PromptLookup, "recycling": TokenRecycling}
STEEP = Budget((1, 64), (0,), ((1.0, 64.0),))
FLAT = Budget((1, 64), (0,), ((1.0, 1.0001),))


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for benchmark in (composition, sweep):
        monkeypatch.setattr(benchmark, "load_drafter", lambda name: MAKERS[name]())
        monkeypatch.setattr(benchmark, "track", lambda items, _: items)
        monkeypatch.setattr(benchmark, "compose", _eager(benchmark.compose))


def _eager(compose):
    return lambda *args, packed, **kwargs: compose(*args, **kwargs)  # float64 cannot be packed


def asked(count=2):
    return [Question(prompt(seed=seed), "any") for seed in range(count)]


def test_a_sweep_prices_fixed_rows_and_the_choice_by_each_curve():
    told = sweep.swept(tiny(), "ppd", {"steep": STEEP, "flat": FLAT}, asked(), 30)
    assert told["fixed"]["1"] == {"tokens_per_forward": 1.0, "rows_per_forward": 1.0}
    assert {"16", "offline 16"} < set(told["fixed"])
    steep, flat = told["curves"]["steep"], told["curves"]["flat"]
    assert steep["best_fixed"] == "1"
    assert steep["over_best_fixed"] == pytest.approx(1.0, abs=0.05)
    assert flat["over_plain"] >= 0.99
    assert steep["fixed_over_plain"]["16"] < 0.2


def test_variants_of_a_composition_decode_the_same_number_of_tokens():
    names = ["ppd", "recycling"]
    told = [composition.decoded(tiny(), asked(), 20, FLAT, variant) for variant in composition.variants(names)]
    assert [variant["name"] for variant in told] == [
        *names, "all", "all, highest claim", "all, weights not learnt", "all, promises believed", "all, always asked",
        "all, nobody extends",
    ]  # fmt: skip
    for variant in told:
        assert variant["tokens_per_forward"] >= 1
        assert variant["tokens_per_second"] > 0
