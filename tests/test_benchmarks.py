"""Benchmarks that decode run on a small model, and their figures are those of the decoding."""

import json
import subprocess

import accelerator
import acceptance
import attention
import composition
import exactness
import latency
import peers
import pytest
import shapes
import steps
import sweep
import torch
import training
import typer
from ppd_compose.integrations.lookup import PromptLookup
from ppd_compose.integrations.medusa import MC_SIM_7B_63
from ppd_compose.integrations.medusa.choices import Choices
from ppd_compose.integrations.recycling import TokenRecycling
from test_compose import tokenizer
from test_prefix import with_prefix
from tiny import prompt, prompt_tokens, tiny

from ppd_compose import Budget, TokenTree, compose
from ppd_compose.bench import greedy
from ppd_compose.loading import LoadedBase
from ppd_compose.questions import Question
from ppd_compose.replies import Reply

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
        "all, nobody extends", "ppd, offline tree of 16 rows",
    ]  # fmt: skip
    for variant in told:
        assert variant["tokens_per_forward"] >= 1
        assert variant["tokens_per_second"] > 0


def test_the_static_tree_of_the_ablation_is_a_tree():
    assert len(Choices.of(MC_SIM_7B_63[: composition.STATIC], 4).parents) == composition.STATIC + 1


def test_subsets_of_drafters():
    names = ["ppd", "lookup", "recycling"]
    assert [name for name, _, _ in composition.subsets(names, 1)] == [*names, "ppd+lookup+recycling"]
    assert [name for name, _, _ in composition.subsets(names, 2)] == [
        *names, "ppd+lookup", "ppd+recycling", "lookup+recycling", "ppd+lookup+recycling",
    ]  # fmt: skip
    assert len(list(composition.subsets(names, 3))) == 7


@pytest.mark.parametrize("kind", training.KINDS)
def test_training_tells_seconds_and_accuracies(kind):
    base = tiny(dtype=torch.float32)
    replies = [Reply(prompt(seed=seed)[0].tolist(), list(range(2, 30))) for seed in range(5)]
    few, more = training.trained(kind, base, replies[:-1], replies[-1:], [2, 4])
    assert (few["amount"], more["amount"]) == (2, 4)
    for told in (few, more):
        assert told["seconds"] > 0
        assert all(0 <= share <= 1 for shares in told["accuracy"] for share in shares)


def test_a_draft_is_right_as_far_as_it_holds_the_text():
    draft = TokenTree.of([7, 3, 4, 5, 6, 9], [-1, 0, 0, 2, 2, 4], [0.0, -2.0, -1.0, -3.0, -1.5, -2.0]).marked(1)
    other = TokenTree.of([7, 4, 8, 2], [-1, 0, 0, 1], [0.0, -3.0, -2.0, -4.0]).marked(2)
    assert acceptance.hits([1, 7, 4, 5, 9], 2, [draft], 1) == {1: 0, 2: 1}
    assert acceptance.hits([1, 7, 3, 8], 2, [draft], 1) == {1: 1}
    assert acceptance.hits([1, 7, 8], 2, [draft], 1) == {}
    assert acceptance.hits([1, 7, 4, 6, 9, 2], 2, [draft, other], 1) == {1: 0, 2: 0, 3: 0}
    assert acceptance.hits([1, 7, 4, 6, 9, 2], 2, [draft, other], 2) == {1: 0}
    assert acceptance.hits([1, 7, 8, 6], 2, [draft, other], 1) == {}


def test_acceptance_tells_each_drafters_share(monkeypatch):
    monkeypatch.setattr(acceptance, "track", lambda items, _: items)
    monkeypatch.setattr(acceptance, "drafters_of", lambda listing: [MAKERS[name]() for name in listing.split("+")])
    told = acceptance.measured(tiny(), "recycling+lookup", asked(), 40, 16)
    assert set(told["drafts"]) == {"recycling", "lookup"}
    assert told["tokens_per_forward"] > 1
    for by_depth in told["right"].values():
        assert all(0 < sum(by_rank.values()) <= 1 for by_rank in by_depth.values())


def test_latency_leaves_the_cache_as_it_was(monkeypatch):
    monkeypatch.setattr(latency, "track", lambda items, _: items)
    model = compose(tiny(dtype=torch.float32), budget=16)
    points = list(latency.curves({"eager": model, "again": model}, [8, 24], [1, 4], 2))
    assert [(point["context"], point["rows"]) for point in points] == [(8, 1), (8, 4), (24, 1), (24, 4)]
    assert all(seconds > 0 for point in points for seconds in point["seconds"].values())
    assert all(point["floor_seconds"] > 0 for point in points)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("rows", [1, 6])
def test_ways_to_attend_agree(rows):
    model, _ = shapes.base_of("tiny", "float32", "cpu")
    given = attention.layers_of(model.config, 40, rows, model.get_input_embeddings().weight.detach())[0]
    assert given.see.sum() > 2 * rows - 2
    assert max(attention.errors(attention.WAYS, given).values()) < 1e-5


def test_the_floor_of_a_forward_is_what_it_must_read():
    model, _ = shapes.base_of("tiny", "float32", "cpu")
    inputs = model.get_input_embeddings().weight
    weights = sum(weight.numel() for weight in model.parameters()) - inputs.numel()
    with torch.no_grad(), latency.filled(model, 8) as cache:
        assert latency.bytes_read(model, cache) == 4 * (weights + 2 * 2 * 2 * 8 * 16)


def test_steps_of_a_random_base_accept_as_often_as_told(tmp_path):
    told = []
    for rate in (0.0, 0.9):
        file = tmp_path / f"{rate}.json"
        steps.main(
            rows=[16], ways="eager", rate=rate, prompt=24, tokens=60, rounds=1, dtype="float32", json_file=file
        )  # fmt: skip
        told.append(json.loads(file.read_text())["contenders"])
    never, often = (made["composed eager 16"] for made in told)
    assert never["tokens_per_forward"] == 1.0
    assert often["tokens_per_forward"] > 1.3
    assert set(told[0]) == {"generate", "generate static", "composed eager 16"}
    assert 0 < often["host_share"] < 1


def test_parts_for_an_accelerator_are_run_once_and_those_that_fail_are_told(tmp_path, monkeypatch):
    ran = []

    def run(command, check, stdout, timeout, env):
        script, file = command[1], command[command.index("--json") + 1]
        ran.append(script)
        assert 0 < timeout < 600
        assert env["TORCH_CUDNN_SDPA_DEPRIORITIZED"] == "1"
        (tmp_path / file).write_text("{}")
        if script.endswith("throughput.py") and len(ran) == 1:
            raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(typer.Exit):
        accelerator.main(tmp_path, shapes="tiny+1b")
    assert len(ran) == 7
    assert (tmp_path / "throughput.partial.json").exists()
    accelerator.main(tmp_path, shapes="tiny+1b")
    assert len(ran) == 8
    assert ran[-1] == ran[0]
    for base in ("demo", "135m"):
        assert sum(share for _, share, _ in accelerator.parts(base, ["1b", "7b"], "cuda", "bfloat16")) == pytest.approx(
            1.0
        )


LOGITS = {"max_new_tokens": 40, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@pytest.mark.parametrize("drafter", [lambda base: prompt_tokens(), with_prefix], ids=["no prefix", "prefix"])
def test_rows_computed_alone_give_the_very_numbers_of_generate(drafter):
    base = tiny(dtype=torch.bfloat16)
    model = compose(base, drafter(base), budget=12)
    products = exactness.products(base)
    for seed in range(4):
        ids = prompt(seed=seed)
        expected = base.generate(
            ids, max_new_tokens=40, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        with exactness.as_alone(exactness.ALL, products, exactness.NearTies(0.5)):
            told = model.generate(
                ids, max_new_tokens=40, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        assert torch.equal(told.sequences, expected.sequences)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(told.logits, expected.logits, strict=True))
    assert torch.nn.Linear.forward.__qualname__ == "Linear.forward"


@pytest.mark.parametrize("drafter", [lambda base: prompt_tokens(), with_prefix], ids=["no prefix", "prefix"])
def test_near_ties_are_decided_by_forwards_of_one_row_and_leave_the_cache_as_it_was(drafter):
    base = tiny(dtype=torch.float32)
    model = compose(base, drafter(base), "recycling", budget=8)
    told = {}
    for gap in (-1.0, float("inf")):
        ties = exactness.NearTies(gap)
        with exactness.as_alone(exactness.NEAR_TIES, {}, ties):
            assert greedy(model, prompt(), 40) == greedy(base, prompt(), 40)
        told[gap] = ties.forwards
    assert told[-1.0] == 0
    assert told[float("inf")] > 10


def test_peers_that_cannot_run_here_are_skipped_with_the_reason(tmp_path):
    loaded = LoadedBase(tiny(), tokenizer(), "tiny", "here")
    asked_for = ["transformers lookup", "transformers assisted", "economize lookup", "dejavuu recycling", "llama.cpp"]
    files = peers.Files(tmp_path / "no.gguf")
    told = {name: (made, reason) for name, made, reason in peers.peers(loaded, asked_for, files)}
    assert list(told) == asked_for
    for name, (made, reason) in told.items():
        assert (made is None) == bool(reason), name
    assert "--assistant" in told["transformers assisted"][1]
    made, _ = told["transformers lookup"]
    assert greedy(made, prompt(), 12) == greedy(tiny(), prompt(), 12)


def test_an_assistant_model_is_a_peer_where_one_is_named(tmp_path):
    loaded = LoadedBase(tiny(), tokenizer(), "tiny", "here")
    tiny().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    files = peers.Files(tmp_path / "no.gguf", str(tmp_path))
    [(_, made, reason)] = peers.peers(loaded, ["transformers assisted"], files)
    assert not reason
    assert greedy(made, prompt(), 12) == greedy(tiny(), prompt(), 12)
