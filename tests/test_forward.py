"""Packed and compiled forwards: the base's tokens, its parameters, and what cannot be had."""

import gc
import shutil
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from types import MethodType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from ppd_compose.integrations.medusa import MedusaHeads
from test_eagle import eagle
from test_medusa import random_heads
from test_prefix import with_prefix
from tiny import FAMILIES, Oracle, prompt, prompt_tokens, tiny
from torch import nn
from transformers import DynamicCache

from ppd_compose import (
    Budget,
    TokenTree,
    compiled,
    compose,
    grouped,
    hookimpl,
    kernels,
    measured,
    packed,
    regions,
    written,
)
from ppd_compose.built import built
from ppd_compose.cache import GENERATE_NAME, commit, recording, with_cache
from ppd_compose.forward import Forward, forward_of
from ppd_compose.inplace import count, make_room
from ppd_compose.mask import unplanned
from ppd_compose.packed import PackedLinear, can_pack
from ppd_compose.verify import Context, verify

PACKABLE = can_pack(tiny(dtype=torch.float32))
needs_packing = pytest.mark.skipif(not PACKABLE, reason="torch has no oneDNN here")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def answer(model, ids=None, tokens=24, **settings):
    ids = prompt() if ids is None else ids
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **{"do_sample": False, **settings}
    )


def test_what_is_changed_on_the_base_between_calls_is_seen_by_the_next():
    base = tiny(dtype=torch.float32)
    model = compose(base, prompt_tokens(), budget=12)
    assert torch.equal(answer(model), answer(base))
    base.set_attn_implementation("eager")
    assert torch.equal(answer(model), answer(base))
    base.double()  # masks that are added are of the dtype of what they are added to
    assert torch.equal(answer(model), answer(base))
    before = answer(base)
    base.set_input_embeddings(nn.Embedding.from_pretrained(base.get_input_embeddings().weight.roll(1, 0)))
    assert torch.equal(answer(model), answer(base))
    assert not torch.equal(before, answer(base))


@needs_packing
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_weights_give_the_tokens_of_the_base(family):
    base = tiny(family, dtype=torch.float32, attention="eager")
    model = compose(base, prompt_tokens(), budget=12, packed=True)
    assert torch.equal(answer(model), answer(base))


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_are_those_of_the_base(dtype):
    base = tiny(dtype=dtype)
    model = compose(base, packed=True)
    assert type(model.lm_head) is PackedLinear
    assert not any(isinstance(module, PackedLinear) for module in base.modules())
    mine, theirs = dict(model.named_parameters()), dict(base.named_parameters())
    assert all(mine[name] is parameter for name, parameter in theirs.items())
    with torch.no_grad():
        here, there = model(input_ids=prompt()).logits, base(input_ids=prompt()).logits
    torch.testing.assert_close(here, there)


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_layers_of_the_same_rows_say_together_what_each_says(dtype, rows):
    base = tiny("qwen2", dtype=dtype)
    attention = compose(base, packed=True).model.layers[0].self_attn
    plain = base.model.layers[0].self_attn
    with torch.no_grad():
        for seed in (0, 1):
            given = torch.randn(1, rows, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)
            for names in (["q_proj", "k_proj", "v_proj"], ["v_proj", "v_proj", "q_proj"], ["k_proj"]):
                for name in names:
                    torch.testing.assert_close(getattr(attention, name)(given), getattr(plain, name)(given))
    assert attention.q_proj.siblings is attention.k_proj.siblings is attention.v_proj.siblings
    assert attention.o_proj.siblings is None


@needs_packing
def test_several_threads_decode_at_once():
    base = tiny(dtype=torch.float32)
    model = compose(base, packed=True)
    given = [torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    attention = model.model.layers[0].self_attn

    def ask(rows):
        with torch.no_grad():
            return [torch.cat([attention.q_proj(rows), attention.k_proj(rows)], -1) for _ in range(50)]

    expected = [ask(rows)[0] for rows in given]
    with ThreadPoolExecutor(8) as pool:
        for told, right in zip(pool.map(ask, given), expected, strict=True):
            assert all(torch.equal(each, right) for each in told)


@needs_packing
def test_a_weight_that_changes_is_packed_anew():
    base = tiny(dtype=torch.float32)
    model = compose(base, prompt_tokens(), budget=8, packed=True)
    answer(model)
    before = answer(base)
    with torch.no_grad():
        for layer in base.model.layers:
            layer.mlp.down_proj.weight.mul_(-1.5)
    assert not torch.equal(answer(base), before)
    assert torch.equal(answer(model), answer(base))
    base.lm_head.weight.data = base.lm_head.weight.data.flip(0)
    assert torch.equal(answer(model), answer(base))


@needs_packing
def test_what_was_packed_before_a_merge_serves_nobody_after_it():
    base = tiny(dtype=torch.float32)
    before = answer(compose(base, prompt_tokens(), budget=8, packed=True))
    for layer in base.model.layers:
        layer.mlp.down_proj.weight.data *= -1.5
    merged = answer(compose(base, prompt_tokens(), budget=8, packed=True))
    assert torch.equal(merged, answer(base))
    assert not torch.equal(merged, before)


@needs_packing
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_weights_that_a_fused_optimiser_wrote_are_packed_anew(optimizer):
    base = tiny(dtype=torch.float32)
    model = compose(base, prompt_tokens(), budget=8, packed=True)
    before, ids = answer(model), prompt()
    steps = optimizer(base.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        base(ids, labels=ids).loss.backward()
        steps.step()
    assert not torch.equal(answer(base), before)
    assert torch.equal(answer(model), answer(base))


@needs_packing
def test_an_adapter_that_is_put_around_a_packed_composition_is_merged_into_it():
    base = tiny(dtype=torch.float32)
    model = compose(base, prompt_tokens(), budget=8, packed=True)
    plain = answer(model)
    tuned = get_peft_model(model, LoraConfig(init_lora_weights=False, target_modules="all-linear", lora_alpha=32))
    tuned.eval()
    expected = tuned.generate(input_ids=prompt(), max_new_tokens=24, do_sample=False)
    assert not torch.equal(expected, plain)
    tuned.merge_adapter()
    assert torch.equal(tuned.generate(input_ids=prompt(), max_new_tokens=24, do_sample=False), expected)
    tuned.unmerge_adapter()
    assert torch.equal(answer(tuned.merge_and_unload()), expected)


def _assign(base):
    base.load_state_dict({name: tensor.clone() for name, tensor in base.state_dict().items()}, assign=True)


@needs_packing
@pytest.mark.parametrize(
    "change",
    [
        _assign,
        lambda base: base.resize_token_embeddings(90, mean_resizing=False),
        lambda base: base.set_output_embeddings(nn.Linear(32, 61, bias=False)),
        lambda base: setattr(base.model.layers[1].mlp, "up_proj", nn.Linear(32, 64, bias=False)),
        lambda base: base.model.layers[0].mlp.register_forward_hook(lambda module, given, out: -out),
    ],
)
def test_packed_what_is_replaced_on_the_base_after_composing_is_told(change):
    base = tiny(dtype=torch.float32)
    model = compose(base, prompt_tokens(), budget=8, packed=True)
    change(base)
    with pytest.raises(ValueError, match=r"parameters or hooks of the base are others since.*compose anew"):
        answer(model)
    assert torch.equal(answer(compose(base, prompt_tokens(), budget=8, packed=True)), answer(base))


@needs_packing
def test_packed_a_base_that_is_set_to_evaluation_after_composing_has_no_dropout():
    base = tiny("gpt2", dtype=torch.float32).train()  # has dropout
    model = compose(base, prompt_tokens(), budget=8, packed=True)
    base.eval()
    assert torch.equal(answer(model), answer(base))


def test_a_base_in_which_a_module_is_none_is_decoded():
    base = tiny(dtype=torch.float32)
    base.model.layers[0].register_module("extra", None)
    for way in ({}, {"packed": True} if PACKABLE else {}):
        assert torch.equal(answer(compose(base, prompt_tokens(), budget=8, **way)), answer(base))


@needs_packing
def test_packed_weights_go_when_the_base_goes():
    gc.collect()
    kept = len(packed._packs)
    base = tiny(dtype=torch.float32)
    model = compose(base, budget=8, packed=True)
    answer(model)
    assert len(packed._packs) > kept
    del base, model
    gc.collect()
    assert len(packed._packs) == kept


class Doubled(torch.Tensor):
    """A weight that stands for another one, as quantised weights do, and cannot be put beside others."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            rows, weight, *bias = args
            return func(rows, 2 * weight.as_subclass(torch.Tensor), *bias)
        if func is torch.cat:
            raise NotImplementedError(func)
        return super().__torch_function__(func, types, args, kwargs)


@needs_packing
@pytest.mark.parametrize("way", [{}, {"packed": True}])
def test_weights_that_are_no_plain_tensors_are_left_to_their_own(way):
    base = tiny(dtype=torch.float32)
    layer = base.model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Doubled), requires_grad=False)
    assert torch.equal(answer(compose(base, prompt_tokens(), budget=8, **way)), answer(base))


class Drafts:
    """Observer of what is verified: the same guesses from packed heads as from others."""

    def __init__(self):
        self.trees = []

    @hookimpl
    def observe(self, step):
        self.trees.append(step.tree.tokens.tolist())


TOKEN_MAP = torch.arange(3, 50)
HEADS = {
    "medusa": lambda: MedusaHeads(random_heads(2, token_map=TOKEN_MAP, vocab=61)),
    "medusa, the base's output head": lambda: MedusaHeads(random_heads(2)),
    "medusa, own output heads": lambda: MedusaHeads(random_heads(2, outputs=2)),
    "eagle 1": lambda: eagle(1),
    "eagle 3": eagle,
}


@needs_packing
@pytest.mark.parametrize("kind", HEADS)
def test_heads_of_a_packed_composition_are_packed_too_and_guess_the_same(kind):
    gc.collect()
    base, made = tiny(dtype=torch.float32), HEADS[kind]()
    packs, drafts = [], []
    for way in ({}, {"packed": True}):
        drafts.append(Drafts())
        model = compose(base, made, budget=10, plugins=[drafts[-1]], **way)
        before = len(packed._packs)
        with torch.inference_mode():
            told = answer(model)
        assert torch.equal(told, answer(base))
        packs.append(len(packed._packs) - before)
    assert drafts[0].trees == drafts[1].trees
    own = sum(type(module) is PackedLinear and module.siblings is None for module in model.modules())
    together = 2 * base.config.num_hidden_layers
    assert packs[0] == 0
    assert packs[1] >= own + together + (kind != "medusa, the base's output head")
    answer(model)
    assert len(packed._packs) == before + packs[1]


@pytest.mark.parametrize("change", [lambda p: p.neg_(), lambda p: p.add_(1.0)])
@pytest.mark.parametrize("kind", ["medusa", "eagle 3"])
def test_heads_that_use_the_bases_output_head_follow_it(kind, change):
    base, made = tiny("phi3", dtype=torch.float32), HEADS[kind]()
    base.lm_head.bias = torch.nn.Parameter(torch.zeros(61))
    for _ in range(2):
        drafts = [Drafts(), Drafts()]
        for drafter, seen in zip((made, HEADS[kind]()), drafts, strict=True):
            told = answer(compose(base, drafter, budget=10, plugins=[seen]))
            assert torch.equal(told, answer(base))
        assert drafts[0].trees == drafts[1].trees
        with torch.no_grad():
            change(base.lm_head.bias[::2])


@needs_packing
@pytest.mark.parametrize("narrow", [True, False], ids=["in float16", "in float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_cpu_that_does_not_multiply_in_half_precision_says_the_same(family, dtype, narrow, monkeypatch):
    monkeypatch.setattr(kernels, "_native", lambda dtype: dtype == torch.float32)
    if not narrow:
        monkeypatch.setattr(kernels, "_has_fbgemm", lambda: False)
    base = tiny(family, dtype=dtype)
    model = compose(base, packed=True)
    with torch.no_grad():
        here, there = model(input_ids=prompt()).logits, base(input_ids=prompt()).logits
    assert here.dtype == dtype
    torch.testing.assert_close(here, there)


@needs_packing
@pytest.mark.parametrize("scale", [1, 1e-6, 1e6])
@pytest.mark.parametrize("biased", [True, False])
def test_weights_that_float16_cannot_hold_are_multiplied_as_exactly(scale, biased, monkeypatch):
    monkeypatch.setattr(kernels, "_native", lambda dtype: dtype == torch.float32)
    dice = torch.Generator().manual_seed(0)
    rows, weight, bias = (torch.randn(*shape, generator=dice).bfloat16() for shape in ((2, 3, 64), (40, 64), (40,)))
    weight[::3] *= scale  # some rows of the weight are too small or too large for it, others are not
    told = kernels.multiplier(weight, bias if biased else None)(rows)
    expected = nn.functional.linear(rows.double(), weight.double(), bias.double() if biased else None)
    assert told.dtype == torch.bfloat16
    torch.testing.assert_close(told.double(), expected, rtol=2**-8, atol=1e-5 * scale)


@needs_packing
def test_who_composes_where_further_rows_are_dear_is_told_the_way_out(monkeypatch):
    monkeypatch.setattr(kernels, "_native", lambda dtype: dtype == torch.float32)
    base = tiny(dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match=r"does not multiply in torch.bfloat16.*packed=True or compile=True") as told:
        compose(base)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compose(base, packed=True)
        compose(tiny(dtype=torch.float32))


@needs_packing
def test_half_precision_is_widened_on_arm_and_nothing_is_said_of_its_speed(monkeypatch):
    """There oneDNN takes a hundred times as long for laid out weights of it."""
    monkeypatch.setattr(kernels.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(kernels, "_has_fbgemm", lambda: False)
    monkeypatch.setattr(
        kernels, "_by_onednn", lambda weight, bias: lambda rows: nn.functional.linear(rows, weight, bias)
    )
    dice = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(*shape, generator=dice).bfloat16() for shape in ((3, 64), (40, 64)))
    assert torch.equal(kernels.multiplier(weight, None)(rows), (rows.float() @ weight.float().T).bfloat16())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compose(tiny(dtype=torch.bfloat16))


def test_a_torch_without_onednn_packs_nothing_and_says_so(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    base = tiny(dtype=torch.float32)
    with pytest.warns(UserWarning, match="built without oneDNN.*packed=True changes nothing") as told:
        model = compose(base, prompt_tokens(), budget=8, packed=True)
    assert told[0].filename == __file__
    assert torch.equal(answer(model), answer(base))


@pytest.mark.parametrize("native", [True, False])
def test_float16_is_packed_where_the_cpu_does_not_multiply_in_it(native, monkeypatch):
    monkeypatch.setattr(kernels, "_native", lambda dtype: native)
    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    expected = [True, not native, True, False] if PACKABLE else [False] * 4
    assert [kernels.can_multiply(dtype) for dtype in dtypes] == expected


@needs_packing
def test_products_that_cannot_be_packed_are_computed_as_ever():
    rows, weight = torch.randn(2, 8), torch.randn(6, 8)
    expected = torch.nn.functional.linear(rows, weight)
    kept = len(packed._packs)
    torch.testing.assert_close(packed.product(rows, weight.requires_grad_()), expected)  # gradients are wanted
    with torch.no_grad():
        assert torch.equal(
            packed.product(rows.double(), weight.double()), nn.functional.linear(rows.double(), weight.double())
        )
        assert len(packed._packs) == kept
        torch.testing.assert_close(packed.product(rows, weight), expected)
        assert len(packed._packs) == kept + 1


@needs_packing
def test_packed_models_can_be_trained():
    base = tiny(dtype=torch.float32)
    model = compose(base, packed=True)
    model(input_ids=prompt(), labels=prompt()).loss.backward()
    assert all(parameter.grad is not None for parameter in base.model.layers.parameters())


@needs_packing
def test_layers_of_other_kinds_are_left_alone():
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    base = tiny(dtype=torch.float32)
    base.lm_head.__class__ = Doubled
    assert torch.equal(answer(compose(base, prompt_tokens(), budget=8, packed=True)), answer(base))


@needs_packing
def test_layers_of_a_dtype_without_kernels_are_left_alone():
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.float64)])
    packed.pack_layers(layers)
    assert [type(layer) for layer in layers] == [PackedLinear, nn.Linear]


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match=r"in torch.float64: leave packed=False"):
        compose(tiny(), packed=True)


@needs_compiler
def test_a_compiled_forward_gives_the_tokens_of_the_base(nothing_compiled):
    """With rows of prompt tokens and without, of two compositions, after a warm-up and for another length."""
    base = tiny(dtype=torch.float32)
    model = compose(base, prompt_tokens(), budget=12, compile=True)
    model.warmup()
    with nothing_compiled():
        for ids in (prompt(), prompt(33, seed=2)):
            assert torch.equal(answer(model, ids), answer(base, ids))
        assert torch.equal(answer(compose(base, budget=1, compile=True)), answer(base))
    assert "forward" not in vars(base)


WAYS = {
    "llama": [], "qwen3": [], "phi3": [], "gpt_neox": [], "opt": [],
    "gemma3": [],  # layers of several kinds: there are no regions to try
    "gpt2": ["regions"],  # its layers look up their numbers
    "mixtral": ["regions", "whole"],  # experts are called by what the router says
}  # fmt: skip


# Tracing takes as long for each layer, and of Mixtral for each expert.
FEW_LAYERS = {
    "gpt2": {"n_layer": 2},
    "gemma3": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": {"num_hidden_layers": 2, "num_local_experts": 2, "num_experts_per_tok": 1},
}


@pytest.mark.parametrize("family", WAYS)
def test_layers_that_are_alike_share_a_graph_and_others_are_not_taken_for_each_other(family, monkeypatch, traced):
    monkeypatch.setattr(regions, "MOST", 1)  # several regions
    monkeypatch.setattr(compiled, "_refused", refused := set())
    base = tiny(family, **FEW_LAYERS.get(family, {"num_hidden_layers": 2}))
    model = compose(base, Oracle(answer(base)[0].tolist()), prompt_tokens(), budget=12, compile="regions")
    assert torch.equal(answer(model), answer(base))
    assert {way for way, _ in refused} <= set(WAYS[family])  # a newer torch traces more
    with torch.compiler.set_stance("default" if refused else "fail_on_recompile"):
        assert torch.equal(answer(model), answer(base))


def test_one_graph_serves_a_prompt_of_one_token_and_what_follows(traced):
    """Sizes that are equal where it is traced are others later."""
    base = tiny(dtype=torch.float32, num_hidden_layers=1)
    model = compose(base, budget=1, compile=True)
    answer(model, prompt(1), tokens=2)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(answer(model, prompt(1)), answer(base, prompt(1)))


@pytest.mark.parametrize("compile", [True, "regions"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("drafter", [lambda base: prompt_tokens(), with_prefix], ids=["no prefix", "prefix"])
def test_one_graph_serves_all_that_a_budget_is_measured_by_and_what_follows(family, drafter, compile, traced):
    base = tiny(family, dtype=torch.float32, **FEW_LAYERS.get(family, {"num_hidden_layers": 2}))
    model = compose(base, drafter(base), compile=compile)
    model.warmup()
    assert torch.equal(answer(model), answer(base))
    assert len(traced) == 1


def reversed_(layer, *args, **kwargs):
    return -type(layer).forward(layer, *args, **kwargs)


def test_a_layer_whose_own_forward_was_replaced_is_not_taken_for_the_others(monkeypatch, traced):
    monkeypatch.setattr(regions, "MOST", 1)
    base, other = (tiny(dtype=torch.float32) for _ in range(2))
    layer = other.model.layers[1]
    layer.forward = MethodType(reversed_, layer)
    for each in (base, other):
        model = compose(each, prompt_tokens(), budget=12, compile="regions")
        assert torch.equal(answer(model), answer(each))
    assert not torch.equal(answer(other), answer(base))


def test_layers_that_share_tensors_are_not_taken_for_others(monkeypatch, traced):
    monkeypatch.setattr(regions, "MOST", 2)
    base, other = (tiny(dtype=torch.float32, num_hidden_layers=4) for _ in range(2))
    for name, module in other.model.layers[0].named_modules():
        for key, parameter in module._parameters.items():
            other.model.layers[1].get_submodule(name)._parameters[key] = parameter
    for each in (other, base):
        model = compose(each, prompt_tokens(), budget=12, compile="regions")
        assert torch.equal(answer(model), answer(each))
    assert not torch.equal(answer(other), answer(base))


def test_experts_that_a_router_calls_are_not_taken_for_those_of_another_layer(traced):
    base = tiny("mixtral", **FEW_LAYERS["mixtral"])
    assert torch.equal(answer(compose(base, prompt_tokens(), budget=12, compile=True)), answer(base))


@pytest.mark.parametrize("way", [True, "regions"])
def test_models_of_a_class_that_are_built_otherwise_share_no_graph(way, traced):
    for change in ({}, {"hidden_act": "gelu"}, {"rms_norm_eps": 0.5}, {"attention_bias": True}):
        base = tiny(dtype=torch.float32, num_hidden_layers=2, **change)
        assert torch.equal(answer(compose(base, prompt_tokens(), budget=12, compile=way)), answer(base)), change


@pytest.mark.parametrize("way", [True, "regions"])
def test_what_is_set_in_a_compiled_composition_is_seen_at_the_next_call(way, traced):
    base, changed = tiny(dtype=torch.float32), tiny(dtype=torch.float32)
    model = compose(base, prompt_tokens(), budget=12, compile=way)
    assert torch.equal(answer(model), answer(base))
    for each in (model, changed):
        each.model.layers[1].mlp.act_fn = torch.nn.Tanh()
        each.model.norm.variance_epsilon = 0.5
        each.lm_head.weight = torch.nn.Parameter(each.lm_head.weight.flip(0))
    assert not torch.equal(answer(changed), answer(base))
    assert torch.equal(answer(model), answer(changed))
    with torch.no_grad():
        for each in (base, changed):
            each.model.layers[0].mlp.down_proj.weight.mul_(-1.5)
            each.model.layers[1].mlp.down_proj.weight.data = each.model.layers[1].mlp.down_proj.weight.data.flip(0)
    assert torch.equal(answer(model), answer(changed))


@needs_packing
def test_products_of_graphs_see_weights_that_no_prefill_went_through():
    """As of experts that no token of the prompt was sent to."""
    layer, rows = torch.nn.Linear(8, 6, bias=False), torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
    told = []
    with torch.no_grad():
        for change in (torch.nn.Identity(), lambda w: w.mul_(-1.5), lambda w: setattr(w, "data", w.data.flip(0))):
            change(layer.weight)
            told.append(torch.ops.ppd_compose.linear(rows, [layer.weight], []))
            torch.testing.assert_close(told[-1], rows @ layer.weight.T)
    assert not torch.equal(told[0], told[1])


def turned(base):
    return base.model.layers[1].register_forward_hook(lambda module, args, out: -out if torch.is_tensor(out) else out)


def patched(base):
    mlp = base.model.layers[1].mlp
    mlp.forward = MethodType(lambda self, rows: -type(self).forward(self, rows), mlp)


@pytest.mark.parametrize("change", [turned, patched])
def test_modules_that_were_tampered_with_share_no_graph(change, traced):
    plain, other = tiny(dtype=torch.float32), tiny(dtype=torch.float32)
    model = compose(plain, prompt_tokens(), budget=12, compile=True)
    assert torch.equal(answer(model), answer(plain))
    change(other)
    assert not torch.equal(answer(other), answer(plain))
    assert torch.equal(answer(compose(other, prompt_tokens(), budget=12, compile=True)), answer(other))


def test_no_hook_gets_the_number_of_one_that_is_gone():
    """A graph is found again by the hooks that it was made with: were they let go, another could pass for one."""
    base = tiny(dtype=torch.float32)
    bare, handle = built(base), turned(base)
    hook = weakref.ref(base.model.layers[1]._forward_hooks[handle.id])
    hooked = built(base)
    assert hooked == built(base) != bare
    handle.remove()
    gc.collect()
    assert hook() is not None
    assert built(base) == bare


def test_adapters_that_are_switched_or_merged_share_no_graph(traced):
    base = tiny(dtype=torch.float32)
    settings = LoraConfig(
        r=4, lora_alpha=32, init_lora_weights=False, inference_mode=True, target_modules=["down_proj"]
    )
    adapted = get_peft_model(base, settings)
    adapted.add_adapter("other", settings)

    def switch(name):
        adapted.set_adapter(name, inference_mode=True)

    answers = []
    for change in (partial(switch, "default"), partial(switch, "other"), adapted.merge_adapter):
        change()
        answers.append(answer(base))
        assert torch.equal(answer(compose(base, prompt_tokens(), budget=12, compile=True)), answers[-1])
    assert not torch.equal(*answers[:2])


def test_a_word_that_means_no_way_to_compile_is_refused():
    with pytest.raises(ValueError, match="compile is True, False or \"regions\", got 'layers'"):
        compose(tiny(), compile="layers")


@pytest.mark.parametrize("way", [{"compile": True}, {"packed": True}])
def test_a_base_whose_forward_was_replaced_is_neither_compiled_nor_packed(way):
    base = tiny(dtype=torch.float32)
    base.forward = MethodType(type(base).forward, base)
    with pytest.raises(ValueError, match="forward of this base was replaced"):
        compose(base, prompt_tokens(), **way)


@needs_compiler
def test_a_compiled_forward_keeps_to_sliding_windows(nothing_compiled):
    base = tiny("gemma3", dtype=torch.float64, **FEW_LAYERS["gemma3"])
    model = compose(base, prompt_tokens(), budget=12, compile=True)
    assert torch.equal(answer(model, prompt(30)), answer(base, prompt(30)))


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_one_graph_serves_windows_before_and_after_they_fill(family, traced, monkeypatch, nothing_compiled):
    monkeypatch.setattr(written, "ROOM", 40)
    base = tiny(family, **FEW_LAYERS.get(family, {"num_hidden_layers": 2}))
    model = compose(base, prompt_tokens(), budget=12, compile=True)
    model.warmup()
    with nothing_compiled():
        for length in (5, 12, 16, 30, 60):
            assert torch.equal(answer(model, prompt(length)), answer(base, prompt(length)))


@needs_compiler
def test_a_compiled_forward_pads_a_lonely_row():
    base = tiny(dtype=torch.float32)
    model = compose(base, budget=1, compile=True)
    out = answer(model, return_dict_in_generate=True)
    assert torch.equal(out.sequences, answer(base))
    assert out[GENERATE_NAME].get_seq_length() == out.sequences.shape[1] - 1
    assert model.stats.rows_per_forward == 1


@needs_compiler
@pytest.mark.parametrize("way", [True, "regions"])
def test_compiled_forwards_serve_heads_that_read_hidden_states(way, monkeypatch, nothing_compiled):
    monkeypatch.setattr(regions, "MOST", 1)
    monkeypatch.setattr(compiled, "_refused", refused := set())
    base = tiny(dtype=torch.float32)
    heads = [MedusaHeads(random_heads()), eagle()]
    model = compose(base, *heads, prompt_tokens(), budget=12, compile=way)
    model.warmup()
    with nothing_compiled():
        assert torch.equal(answer(model), answer(base))
    assert sum(model.stats.candidates["medusa"].values()) > 0
    assert sum(model.stats.candidates["eagle"].values()) > 0
    assert not refused


def test_budgets_of_quantised_bases_are_kept_apart():
    base = tiny(dtype=torch.float32)
    plain = measured._path(base)
    layer = base.model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Doubled), requires_grad=False)
    assert measured._path(base) != plain


def test_budgets_of_other_ways_are_kept_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("PPD_COMPOSE_HOME", str(tmp_path))
    monkeypatch.setattr(Budget, "measure", classmethod(lambda cls, model: Budget.flat(4)))
    base = tiny(dtype=torch.float32)
    for settings in ({}, {"packed": True}, {}):
        compose(base, prompt_tokens(), **settings).warmup()
    assert len(list((tmp_path / "budgets").iterdir())) == (2 if PACKABLE else 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_an_accepted_path_move_up_also_after_memory_grew(dtype):
    cache, held = DynamicCache(), []
    for layer in range(2):
        held.append(torch.randn(2, 1, 2, 5, 4, generator=torch.Generator().manual_seed(layer)).to(dtype))
        cache.update(*held[layer], layer)
    with recording(cache):
        for rows, path in ((4, [0, 2, 3]), (200, [0, 7, 150]), (3, [0, 1])):
            make_room(cache, rows)
            for layer in range(2):
                new = torch.randn(2, 1, 2, rows, 4, generator=torch.Generator().manual_seed(rows)).to(dtype)
                cache.update(*new, layer)
                held[layer] = torch.cat([held[layer], new[..., path, :]], dim=-2)
            count(cache, rows)
            commit(cache, rows, path)
    for layer, expected in zip(cache.layers, held, strict=True):
        torch.testing.assert_close(torch.stack([layer.keys, layer.values]), expected, rtol=0, atol=0)


def padded(padding):
    ids = torch.cat([torch.zeros(1, padding, dtype=torch.long), prompt()], dim=1)
    return ids, (torch.arange(ids.shape[1]) >= padding)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])  # it has no sdpa
def test_attention_that_repeats_no_keys_says_what_the_base_says(family, padding):
    base = tiny(family)
    model = compose(base, budget=8)
    ids, visible = padded(padding)
    told = []
    for forward in (Forward(model), forward_of(model)):
        cache = DynamicCache(config=base.config)
        with torch.no_grad():
            base(input_ids=ids, attention_mask=visible[None].long(), **with_cache(base, cache))
            tree = TokenTree.of([5, 6, 7, 8], [-1, 0, 0, 1], [0.0] * 4)
            told.append(verify(forward, cache, Context.of(visible), tree, (), {}).logits)
    torch.testing.assert_close(*told)


def test_no_key_is_repeated_for_a_tree(monkeypatch):
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention

    def noted(query, key, value, **settings):
        seen.append((query.shape[1], key.shape[1], settings.get("attn_mask") is not None))
        return real(query, key, value, **settings)

    monkeypatch.setattr(grouped, "scaled_dot_product_attention", noted)
    model = compose(tiny(), prompt_tokens(), budget=12)
    answer(model)
    assert set(seen) == {(2, 2, True)}  # of four heads two share each key
    assert len(seen) >= 3 * (model.stats.forwards - 2)  # all but the prefill, and a bare root at the end


def test_packed_no_key_is_repeated_for_a_single_row(monkeypatch):
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention

    def noted(query, key, value, **settings):
        seen.append((query.shape[1], key.shape[1], settings.get("attn_mask") is not None))
        return real(query, key, value, **settings)

    monkeypatch.setattr(grouped, "scaled_dot_product_attention", noted)
    base = tiny(dtype=torch.float32)
    model = compose(base, packed=True, budget=8)
    assert torch.equal(answer(model), answer(base))
    assert set(seen) == {(2, 2, False)}


def test_an_adapter_that_is_attached_or_switched_after_composing_is_decoded_with():
    base = tiny(dtype=torch.float32)
    model = compose(base, prompt_tokens(), budget=12)
    before = answer(base)
    assert torch.equal(answer(model), before)
    tuned = get_peft_model(base, LoraConfig(init_lora_weights=False, target_modules=["q_proj", "down_proj"]))
    assert not torch.equal(answer(base), before)
    assert torch.equal(answer(model), answer(base))
    tuned.base_model.disable_adapter_layers()
    assert torch.equal(answer(model), before)


def test_packed_an_adapter_that_is_switched_after_composing_is_refused():
    tuned = get_peft_model(
        tiny(dtype=torch.float32), LoraConfig(init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    )
    base = tuned.get_base_model()
    model = compose(base, prompt_tokens(), budget=12, packed=True)
    assert torch.equal(answer(model), answer(base))
    with tuned.disable_adapter(), pytest.raises(ValueError, match=r"now they are .* compose anew"):
        answer(model)
    assert torch.equal(answer(model), answer(base))
    tuned.merge_adapter()
    with pytest.raises(ValueError, match="compose anew"):
        answer(model)


def test_packed_layers_heed_autocast():
    base = tiny(dtype=torch.float32)
    model = compose(base, prompt_tokens(), budget=12, packed=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = answer(base)
        ids = answer(model)
    assert ids.shape == expected.shape
    assert torch.equal(ids[:, :14], expected[:, :14])  # later ones may part at a near tie


def test_a_base_in_eight_bits_that_hand_their_weights_over_has_no_second_layers():
    base = tiny(dtype=torch.float32)
    base.is_loaded_in_8bit = True
    with pytest.raises(ValueError, match="leave packed and compile out"):
        compose(base, packed=True)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # by PEFT 0.19
def test_an_output_head_that_is_adapted_or_resized_after_composing_is_decoded_with():
    base = tiny(dtype=torch.float32)
    model = compose(base, prompt_tokens(), budget=12)
    before = answer(base)
    tuned = get_peft_model(base, LoraConfig(init_lora_weights=False, target_modules=["q_proj", "lm_head"]))
    assert not torch.equal(answer(base), before)
    assert torch.equal(answer(model), answer(base))
    tuned.base_model.unload()
    assert torch.equal(answer(model), before)


@pytest.mark.parametrize("first", ["compose", "base"])
def test_hidden_states_are_told_once_whoever_asks_first(first):
    """transformers hooks modules at the first forward that tells hidden states, and they stay hooked."""
    base, other = tiny(), tiny()
    model = compose(base, eagle(), budget=12)
    for each in [model, base] if first == "compose" else [base, model]:
        answer(each)
        with torch.no_grad():
            states = base(input_ids=prompt(), output_hidden_states=True).hidden_states
            expected = other(input_ids=prompt(), output_hidden_states=True).hidden_states
        assert len(states) == len(expected)
        for mine, theirs in zip(states, expected, strict=True):
            assert torch.equal(mine, theirs)
    once = dict(model.stats.candidates)
    answer(model)
    assert dict(model.stats.candidates) == once


def test_attention_of_trees_on_cuda_is_not_planned_anew_for_every_size():
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    before = enabled()
    with suppress(KeyboardInterrupt), unplanned(torch.device("cuda", 0)):
        assert not enabled()
        with unplanned(torch.device("cuda", 0)):
            assert not enabled()
        assert not enabled()
        raise KeyboardInterrupt
    assert enabled() == before
    with unplanned(torch.device("cpu")):
        assert enabled() == before


@needs_compiler
def test_without_a_compiler_the_way_out_is_told():
    base = tiny(hidden_size=40, num_hidden_layers=1)  # which no other test has compiled
    model = compose(base, prompt_tokens(hidden=40), budget=8, compile=True)
    told = pytest.raises(RuntimeError, match=r"cannot compile .*No working C\+\+ compiler.*or leave compile out")
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}), told:
        answer(model)
    assert torch.equal(answer(compose(base, prompt_tokens(hidden=40), budget=8)), answer(base))
