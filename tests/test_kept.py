"""Compiled graphs in the user's cache: found by the next process, or made anew where they mean something else."""

import json
import shutil
from functools import partial

import pytest
import torch
from packaging.version import Version
from test_forward import answer
from tiny import prompt_tokens, tiny
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama import modeling_llama

from ppd_compose import compiled, compose
from ppd_compose.built import Wordless, built, frozen, worded
from ppd_compose.kept import KeptGraph, can_keep

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or Version(torch.__version__) < Version("2.13"),
    reason="no C++ compiler, or a torch before 2.13, where some cannot keep what they compiled",
)


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("PPD_COMPOSE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "_graphs", {})
    return tmp_path


@pytest.fixture
def another_process(monkeypatch):
    """Call it to know no graph any more but by its file."""
    return lambda: monkeypatch.setattr(compiled, "_graphs", {})


def small():
    return tiny(dtype=torch.float32, num_hidden_layers=2)


def composed(base, way=True):
    return compose(base, prompt_tokens(), budget=12, compile=way)


def files(home):
    return sorted(home.glob("graphs/*/*.graph"))


@needs_compiler
@pytest.mark.parametrize("way", [True, "regions"])
def test_a_process_that_finds_graphs_compiles_nothing(way, home, another_process, nothing_compiled):
    base = small()
    assert torch.equal(answer(composed(base, way)), answer(base))
    (graph,) = files(home)
    another_process()
    with nothing_compiled():
        assert torch.equal(answer(composed(small(), way)), answer(base))
    assert files(home) == [graph]


@needs_compiler
def test_a_file_of_something_else_is_left_and_the_graph_made_anew(home, another_process):
    """One that was cut off, one whose sources were edited since, and one of other globals."""
    base = small()
    expected = answer(base)
    assert torch.equal(answer(composed(base)), expected)
    (graph,) = files(home)
    head, data = graph.read_bytes().split(b"\n", 1)
    told = json.loads(head)
    source, name = next(iter(told["sources"])), next(iter(told["globals"]))
    edited = {**told, "sources": {**told["sources"], source: "0" * 64}}
    other = {**told, "globals": {**told["globals"], name: "something"}}
    spoilt = (graph.read_bytes()[:-1000], *(json.dumps(each).encode() + b"\n" + data for each in (edited, other)))
    for n, written in enumerate(spoilt):
        graph.write_bytes(written)
        another_process()
        assert torch.equal(answer(composed(small())), expected)
        assert len(files(home)) == 2, n
        files(home)[-1].rename(graph)  # the fresh one, with which the next begins


def sees(change, another_process, make=small):
    """Whether compiled forwards of what `make` gives follow a `change`: at the next call, and in the next process."""
    base = make()
    model = composed(base)
    before = answer(base)
    assert torch.equal(answer(model), before)
    change()
    assert not torch.equal(answer(base), before)
    assert torch.equal(answer(model), answer(base))
    another_process()
    assert torch.equal(answer(composed(make())), answer(base))


@needs_compiler
def test_a_global_that_is_replaced_later_is_seen(home, another_process, monkeypatch):
    sees(lambda: monkeypatch.setattr(modeling_llama, "rotate_half", lambda x: 2 * x), another_process)


@needs_compiler
def test_a_forward_that_is_replaced_in_a_class_is_seen_too(home, another_process, monkeypatch):
    def up_alone(self, x):
        return self.down_proj(self.up_proj(x))

    sees(lambda: monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", up_alone), another_process)


def negated(module, query, key, value, mask, **more):
    return sdpa_attention_forward(module, query, key, -value, mask, **more)


@needs_compiler
def test_attention_that_is_registered_anew_is_seen_too(home, another_process, monkeypatch):
    def own():  # as many key heads as others: their attention is left alone
        return tiny(dtype=torch.float32, num_hidden_layers=2, num_key_value_heads=4)

    sees(lambda: monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", negated), another_process, own)


@needs_compiler
def test_a_graph_of_a_function_that_no_other_process_can_name_is_not_written(home, another_process, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama, "rotate_half", lambda x: 2 * x)
        base = small()
        assert torch.equal(answer(composed(base)), answer(base))
    assert not files(home)
    another_process()
    assert torch.equal(answer(composed(small())), answer(base))


@needs_compiler
def test_weights_are_inputs_of_a_graph_also_where_a_user_has_them_frozen(home):
    with torch._inductor.config.patch(freezing=True):
        for seed in (0, 1):
            base = tiny(dtype=torch.float32, num_hidden_layers=2, seed=seed)
            assert torch.equal(answer(composed(base)), answer(base))
        assert torch._inductor.config.freezing


@needs_compiler
def test_graphs_last_as_long_as_the_process_where_a_folder_may_not_be_entered(home, monkeypatch):
    def refuse(*_):
        raise PermissionError("no entry")

    base = small()
    monkeypatch.setattr(type(home), "glob", refuse)
    assert torch.equal(answer(composed(base)), answer(base))


@needs_compiler
def test_without_a_place_for_files_graphs_last_as_long_as_the_process(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PPD_COMPOSE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(compiled, "_graphs", {})
    base = small()
    assert torch.equal(answer(composed(base)), answer(base))


@needs_compiler
def test_where_compiling_ahead_fails_torch_compiles_as_ever(home, monkeypatch):
    base, compile = small(), KeptGraph._compiled
    fails = []

    def breaking(kept, args, kwargs):
        kept.compile = lambda guards: 1 / 0
        fails.append(compile(kept, args, kwargs))

    monkeypatch.setattr(KeptGraph, "_compiled", breaking)
    assert torch.equal(answer(composed(base)), answer(base))
    assert fails == [None]
    assert not files(home)


def test_models_that_are_built_alike_have_the_same_words_and_others_do_not():
    assert worded(built(small())) == worded(built(small()))
    for change in ({"hidden_act": "gelu"}, {"rms_norm_eps": 0.5}, {"attention_bias": True}):
        assert worded(built(tiny(dtype=torch.float32, num_hidden_layers=2, **change))) != worded(built(small()))


def test_what_only_one_process_knows_has_no_words():
    class Local(nn.Module):
        pass

    hooked = small()
    hooked.model.norm.register_forward_hook(lambda *_: None)
    for given in (built(hooked), Local, frozen(lambda: 0), frozen(partial(lambda: 0))):
        with pytest.raises(Wordless):
            worded(given)


@needs_compiler
def test_graphs_of_tensors_that_are_more_than_numbers_are_not_kept():
    class Odd(nn.Parameter):
        pass

    base = small()
    assert can_keep(base)
    base.lm_head.weight = Odd(base.lm_head.weight.detach())
    assert not can_keep(base)


def test_functions_that_are_no_python_are_told_apart():
    assert frozen(torch.tanh) != frozen(torch.sigmoid)


def scaled(x, slope):
    return slope * x


def test_a_function_with_some_of_its_arguments_is_told_from_one_with_others():
    given = [frozen(partial(scaled, slope=slope)) for slope in (2.0, -2.0)]
    assert given[0] != given[1]
    assert worded(given[0]) != worded(given[1])
