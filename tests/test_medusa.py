"""Medusa heads: the numbers of the official code, every published layout, what is refused, and training."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from ppd_compose.integrations.medusa import MC_SIM_7B_63, Heads, MedusaHeads, files
from ppd_compose.integrations.medusa import train as train_module
from ppd_compose.integrations.medusa.choices import Choices
from ppd_compose.integrations.medusa.claims import calibrated, checked, fitted
from ppd_compose.integrations.medusa.command import command
from ppd_compose.integrations.medusa.heads import entry_logits, placed, residual
from ppd_compose.integrations.medusa.layouts import read_tensors, write_tensors
from ppd_compose.integrations.medusa.loss import OUTSIDE, Blocks
from ppd_compose.integrations.medusa.train import Batches, MedusaRecipe, frequent_tokens, train_heads, train_medusa
from safetensors.torch import load_file, save_file
from test_compose import tokenizer
from test_train import replies
from tiny import VOCAB, prompt, prompt_tokens, tiny
from transformers import ModernBertDecoderConfig, ModernBertDecoderForCausalLM
from typer.testing import CliRunner

from ppd_compose import compose, hookimpl, load_drafter, sources
from ppd_compose.finish import OutputHead, output_rows
from ppd_compose.identity import Identity
from ppd_compose.prompts import Prompt
from ppd_compose.replies import Reply
from ppd_compose.testing import check_drafter

FIXTURE = load_file(Path(__file__).parent / "fixtures" / "medusa.safetensors")  # written by the official code
FEW = torch.tensor([3, 5, 8, 9, 20, 41, 60])
RECIPE = MedusaRecipe(
    steps=6, batch_size=2, points=5, checkpoint_every=2, warmup=1, heads=2, layers=2, vocabulary=20, learning_rate=1e-2
)


def random_heads(count=4, layers=1, hidden=32, *, outputs=0, token_map=None, seed=0, dtype=torch.float32, vocab=None):
    dice = torch.Generator().manual_seed(seed)
    entries = VOCAB if token_map is None else len(token_map)
    return Heads(
        0.3 * torch.randn(count, layers, hidden, hidden, generator=dice).to(dtype),
        0.3 * torch.randn(count, layers, hidden, generator=dice).to(dtype),
        tuple(torch.randn(entries, hidden, generator=dice).to(dtype) for _ in range(outputs)),
        token_map,
        vocab,
    )


KINDS = {
    "shared": lambda: MedusaHeads(random_heads()),
    "few": lambda: MedusaHeads(random_heads(token_map=FEW)),
    "own": lambda: MedusaHeads(random_heads(2, 2, outputs=2)),
    "one": lambda: MedusaHeads(random_heads(2, outputs=1, token_map=FEW)),
    "static": lambda: MedusaHeads(random_heads(), choices=MC_SIM_7B_63),
}


def test_the_logits_are_those_of_the_official_code():
    for layers in (1, 2):
        prefix = f"layers{layers}/"
        named = {name.removeprefix(prefix): value for name, value in FIXTURE.items() if name.startswith(prefix)}
        expected = named.pop("logits")
        layout, heads = read_tensors(named, "fixture")
        assert (layout, heads.weight.shape[:2]) == ("official", (4, layers))
        told = entry_logits(residual(FIXTURE["hidden"], heads.weight, heads.bias), heads.outputs)
        torch.testing.assert_close(told, expected, rtol=1e-5, atol=1e-5)


def test_the_static_tree_is_that_of_the_official_code():
    logits = FIXTURE["layers1/logits"][:, 0]
    top = logits.log_softmax(-1).topk(10)
    made = Choices.of(MC_SIM_7B_63, 4)
    tree = made.tree(7, top.indices.numpy(), top.values.numpy())
    assert tree.tokens.tolist() == FIXTURE["tree/tokens"].tolist()
    assert np.array_equal(made.see, FIXTURE["tree/see"].numpy())
    path = np.flatnonzero(made.see[63])  # 0001: the root, three best guesses and a second best
    assert tree.tokens[path[1:]].tolist() == [int(top.indices[k, rank]) for k, rank in enumerate((0, 0, 0, 1))]
    claims = [top.values[k, rank].item() for k, rank in enumerate((0, 0, 0, 1))]
    assert tree.log_probs[63] == pytest.approx(sum(claims))


@pytest.mark.parametrize("kind", ["few", "own", "static"])
def test_heads_pass_the_checks_of_every_drafter(kind):
    base = tiny()
    base(prompt(), output_hidden_states=True)  # transformers leaves hooks of its own, the first time
    check_drafter(lambda base: KINDS[kind](), base)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "qwen3", "opt"])
@pytest.mark.parametrize("kind", ["shared", "few", "one"])
def test_greedy_tokens_are_those_of_generate(family, kind):
    base = tiny(family)
    expected = base.generate(prompt(), max_new_tokens=30, do_sample=False)
    for others in ([], [prompt_tokens()]):
        model = compose(base, KINDS[kind](), *others, budget=32)
        assert torch.equal(model.generate(prompt(), max_new_tokens=30, do_sample=False), expected)
        assert model.stats.candidates["medusa"].total() > 0


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_a_head_that_adds_nothing_repeats_the_bases_own_guess(family):
    """Of the hidden state after the last accepted token: every distance guesses what the root was picked from, and with
    the same chance."""
    base = tiny(family)
    zero = Heads(torch.zeros(2, 1, 32, 32))
    drafter = MedusaHeads(zero)
    seen = []
    propose = drafter.propose
    drafter.propose = hookimpl(lambda step: seen.append((list(step.ids), propose(step))) or seen[-1][1])
    compose(base, drafter, budget=8).generate(prompt(), max_new_tokens=6, do_sample=False)
    assert seen
    for ids, tree in seen:
        own = base(torch.tensor([ids[:-1]])).logits[0, -1].log_softmax(-1)
        top = own.topk(10)
        assert ids[-1] == top.indices[0]
        children = np.flatnonzero(tree.parents == 0)
        best = children[np.argsort(-tree.log_probs[children])]
        assert tree.tokens[best].tolist() == top.indices[: len(best)].tolist()
        assert tree.log_probs[best] == pytest.approx(top.values[: len(best)].tolist(), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_truncated_vocabulary_is_the_same_rows_of_the_output_head(family):
    base = tiny(family)
    weight, bias = output_rows(base, FEW)
    assert bias is None
    assert torch.equal(weight, base.get_output_embeddings().weight[FEW])
    drafter = MedusaHeads(random_heads(token_map=FEW))
    trees = []
    propose = drafter.propose
    drafter.propose = hookimpl(lambda step: trees.append(propose(step)) or trees[-1])
    compose(base, drafter, budget=16).generate(prompt(), max_new_tokens=5, do_sample=False)
    told = {int(token) for tree in trees for token in tree.tokens[1:]}
    assert told
    assert told <= set(FEW.tolist())


def test_an_output_head_with_a_bias_is_used_with_it():
    base = tiny()
    head = torch.nn.Linear(32, VOCAB, bias=True, dtype=torch.float64)
    base.set_output_embeddings(head)
    assert torch.equal(output_rows(base, FEW)[1], head.bias[FEW])
    assert torch.equal(output_rows(base, None)[1], head.bias)


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_heads_that_are_saved_with_the_bases_output_head_say_the_same(family, tmp_path):
    base = tiny(family, dtype=torch.float32)
    drafter = MedusaHeads(random_heads(), identity=Identity.of(base))
    drafter.save_pretrained(tmp_path, base=base, layout="vllm")
    again = MedusaHeads.from_pretrained(tmp_path)
    hidden, told = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)), []
    for each in (drafter, again):
        ready = placed(each.heads.to(base.lm_head.weight), None, base)
        told.append(ready.logits(hidden))
    torch.testing.assert_close(*told)


def test_heads_are_not_saved_with_an_output_head_that_no_layout_stores_whole(tmp_path):
    capped, biased = tiny("gemma2", attention="eager"), tiny()
    biased.set_output_embeddings(torch.nn.Linear(32, VOCAB, bias=True, dtype=torch.float64))
    for base, message in ((capped, "caps its logits"), (biased, "adds a bias to its logits")):
        with pytest.raises(ValueError, match=f"the base {message}, which cannot be stored"):
            MedusaHeads(random_heads()).save_pretrained(tmp_path / "heads", base=base)
    assert not (tmp_path / "heads").exists()


def test_heads_that_would_use_an_output_head_which_is_not_all_are_refused():
    config = ModernBertDecoderConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.4, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    base = ModernBertDecoderForCausalLM(config).eval()
    own = MedusaHeads(random_heads(outputs=1))
    expected = base.generate(prompt(), max_new_tokens=8, do_sample=False)
    model = compose(base, own, budget=8)
    assert torch.equal(model.generate(prompt(), max_new_tokens=8, do_sample=False), expected)
    with pytest.raises(ValueError, match="logits of ModernBertDecoderForCausalLM are not those that its output head"):
        compose(base, MedusaHeads(random_heads()), budget=8)


# Layouts


def official(folder, heads, file="medusa_lm_head.pt", config=None, prefix="", beside=None):
    tensors = {f"{prefix}{name}": value for name, value in write_tensors(heads, "official").items()} | (beside or {})
    folder.mkdir(exist_ok=True)
    save = save_file if file.endswith(".safetensors") else torch.save
    save(tensors, folder / file)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def same(made, expected):
    made = made.heads if isinstance(made, MedusaHeads) else made
    assert torch.equal(made.weight, expected.weight)
    assert (made.bias is None) == (expected.bias is None)
    assert made.bias is None or torch.equal(made.bias, expected.bias)
    assert len(made.outputs) == len(expected.outputs)
    assert all(map(torch.equal, made.outputs, expected.outputs))
    assert (made.token_map is None) == (expected.token_map is None)
    assert made.token_map is None or torch.equal(made.token_map, expected.token_map)


BESIDE = {"model.embed_tokens.weight": torch.zeros(VOCAB, 32), "lm_head.weight": torch.ones(VOCAB, 32)}
WHOLE = {"model_type": "llama", "vocab_size": VOCAB, "hidden_size": 32, "medusa_num_heads": 3, "medusa_num_layers": 1}
FIRST = {"base_model_name_or_path": "lmsys/vicuna-7b-v1.3", "medusa_num_heads": 2, "medusa_num_layers": 1}


def test_the_first_layout_whose_config_counts_wrong(tmp_path):
    heads = random_heads(5, outputs=5, dtype=torch.float16)
    made = MedusaHeads.from_pretrained(official(tmp_path / "a", heads, config=FIRST))
    same(made, heads)
    assert made.base_name == "lmsys/vicuna-7b-v1.3"
    same(MedusaHeads.from_pretrained(official(tmp_path / "b", heads)), heads)  # no config at all


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_whole_checkpoint_gives_its_heads_alone(tmp_path, file):
    heads = random_heads(3, outputs=3)
    official(tmp_path, heads, file, WHOLE, prefix="medusa_head.", beside=BESIDE)
    same(MedusaHeads.from_pretrained(tmp_path), heads)


@pytest.mark.parametrize(("kind", "stem"), [("safetensors", "model"), ("bin", "pytorch_model")])
def test_of_a_sharded_checkpoint_the_shards_with_heads_are_read(tmp_path, kind, stem):
    heads = random_heads(3, outputs=3)
    tensors = {f"medusa_head.{name}": value for name, value in write_tensors(heads, "official").items()}
    shards = [dict(list(tensors.items())[:4]), dict(list(tensors.items())[4:]) | BESIDE]
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05}-of-00003.{kind}"
        (save_file if kind == "safetensors" else torch.save)(shard, tmp_path / file)
        places |= dict.fromkeys(shard, file)
    places["model.norm.weight"] = f"{stem}-00003-of-00003.{kind}"  # not there, and not asked for
    (tmp_path / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": places}))
    (tmp_path / "config.json").write_text(json.dumps(WHOLE))
    same(MedusaHeads.from_pretrained(tmp_path), heads)
    missing = tmp_path / f"{stem}-00001-of-00003.{kind}"
    missing.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"{missing.name} is missing"):
        MedusaHeads.from_pretrained(tmp_path)


def test_heads_that_share_the_bases_output_head(tmp_path):
    heads = random_heads(3, layers=2)
    config = {"version": "2", "medusa_num_heads": 3, "medusa_num_layers": 2, "base_model_name_or_path": "x/y"}
    same(MedusaHeads.from_pretrained(official(tmp_path, heads, files.HEADS, config)), heads)


def vllm(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "medusa", "hidden_size": 32, "vocab_size": VOCAB, **config}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def vllm_tensors(heads, bias=True):
    named = {}
    for i in range(len(heads)):
        for j in range(heads.weight.shape[1]):
            named[f"blocks.{i}.layers.{j}.weight"] = heads.weight[i, j].clone()
            if bias:
                named[f"blocks.{i}.layers.{j}.bias"] = heads.bias[i, j].clone()
        if heads.outputs:
            named[f"lm_heads.{i}.weight"] = heads.outputs[i]
    return named


def test_vllms_layout(tmp_path):
    heads = random_heads(3, 2, outputs=3)
    named = vllm_tensors(heads)
    same(MedusaHeads.from_pretrained(vllm(tmp_path / "a", named, num_heads=3, num_hidden_layers=2)), heads)
    prefixed = {f"medusa_heads.{name}": value for name, value in vllm_tensors(heads, bias=False).items()}
    same(MedusaHeads.from_pretrained(vllm(tmp_path / "b", prefixed)), replace(heads, bias=None))


def test_vllms_truncated_vocabulary(tmp_path):
    heads = random_heads(2, outputs=2)
    cut = replace(heads, outputs=tuple(output[FEW] for output in heads.outputs), token_map=FEW)
    for name, named in (("whole", vllm_tensors(heads)), ("cut", vllm_tensors(cut))):
        folder = vllm(tmp_path / name, named | {"token_map": FEW}, truncated_vocab_size=len(FEW))
        same(MedusaHeads.from_pretrained(folder), cut)


def test_vllms_one_output_head_for_all(tmp_path):
    heads = random_heads(3)
    output = torch.randn(VOCAB, 32)
    for name in ("lm_head.weight", "lm_heads.0.weight"):
        folder = vllm(tmp_path / name, vllm_tensors(heads) | {name: output}, original_lm_head=True)
        same(MedusaHeads.from_pretrained(folder), replace(heads, outputs=(output,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["official", "vllm"])
def test_what_is_saved_is_read_bit_for_bit(tmp_path, layout, dtype):
    base = tiny(dtype=dtype)
    accuracy, calibration = [[0.5, 0.25], [0.4, 0.1]], [[-1.25, 0.75], [0.5, 1.0]]
    for number, kind in enumerate([{}, {"token_map": FEW}, {"outputs": 2}, {"outputs": 2, "token_map": FEW}]):
        heads = random_heads(2, 2, dtype=dtype, **kind)
        made = MedusaHeads(
            heads, accuracy=accuracy, calibration=calibration, identity=Identity.of(base), training={"steps": 3}
        )
        made.save_pretrained(tmp_path / str(number), layout=layout, base=base if layout == "vllm" else None)
        again = MedusaHeads.from_pretrained(tmp_path / str(number))
        if layout == "vllm" and not heads.outputs:
            heads = replace(heads, outputs=(output_rows(base, heads.token_map)[0],))
        same(again, heads)
        assert again.identity == made.identity
        assert again.accuracy.tolist() == accuracy
        assert again.calibration.tolist() == calibration
        assert again.training == {"steps": 3}
        config = json.loads((tmp_path / str(number) / "config.json").read_text())
        assert (config.get("version") == "2") == (not heads.outputs)
        assert isinstance(load_drafter(tmp_path / str(number)), MedusaHeads)
        compose(base, again)


def test_one_output_head_is_stored_for_each_head_where_the_layout_has_no_other_way(tmp_path):
    heads = random_heads(3, outputs=1)
    MedusaHeads(heads).save_pretrained(tmp_path)
    same(MedusaHeads.from_pretrained(tmp_path), replace(heads, outputs=heads.outputs * 3))
    bare = replace(heads, bias=None)
    MedusaHeads(bare).save_pretrained(tmp_path)
    assert not MedusaHeads.from_pretrained(tmp_path).heads.bias.any()


def test_what_cannot_be_saved(tmp_path):
    made = MedusaHeads(random_heads())
    with pytest.raises(ValueError, match="layout 'gguf' is unknown: take one of official, vllm"):
        made.save_pretrained(tmp_path, layout="gguf")
    with pytest.raises(ValueError, match="give base=, the base model"):
        made.save_pretrained(tmp_path, layout="vllm")
    assert not list(tmp_path.iterdir())


def test_saving_replaces_heads_and_never_hides_behind_others(tmp_path):
    MedusaHeads(random_heads(outputs=4)).save_pretrained(tmp_path)
    newer = random_heads(outputs=4, seed=1)
    MedusaHeads(newer).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds medusa_lm_head.safetensors, which would be read instead"):
        MedusaHeads(random_heads(outputs=4)).save_pretrained(tmp_path, layout="vllm")
    same(MedusaHeads.from_pretrained(tmp_path), newer)


@pytest.mark.parametrize(
    ("config", "names", "mine"),
    [
        ({}, {"medusa_lm_head.pt"}, True),
        ({}, {"medusa_lm_head.safetensors", "x"}, True),
        (WHOLE, {"model.safetensors"}, True),
        ({"model_type": "medusa"}, {"model.safetensors"}, True),
        ({"architectures": ["MedusaModel"]}, set(), True),
        ({"model_type": "llama", "architectures": None}, {"model.safetensors", "adapter_model.safetensors"}, False),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, {"pytorch_model.bin"}, False),
        ({}, set(), False),
    ],
)
def test_which_folders_hold_heads(config, names, mine):
    assert MedusaHeads.recognises(config, names) is mine


# Defects


def change(**changed):
    return lambda named: named.update({name.replace("_", ".", 3): value for name, value in changed.items()})


DEFECTS = {
    "missing bias": (lambda t: t.pop("1.0.linear.bias"), r"medusa_lm_head.safetensors lacks 1.0.linear.bias"),
    "missing block": (lambda t: [t.pop(f"1.0.linear.{k}") for k in ("weight", "bias")], "lacks 1.0.linear.weight"),
    "missing output": (lambda t: t.pop("0.1.weight"), "lacks 0.1.weight"),
    "surplus": (lambda t: t.update(other=torch.zeros(1)), "holds other, which belong to no Medusa head"),
    "output without head": (lambda t: t.update({"7.1.weight": torch.zeros(VOCAB, 32)}), "holds 7.1.weight"),
    "absurd number": (
        lambda t: t.update({"999999999.0.linear.weight": torch.zeros(32, 32)}),
        "lacks 3.0.linear.weight",
    ),
    "shape": (lambda t: t.update({"2.0.linear.weight": torch.zeros(32, 16)}), r"2.0.linear.weight must be \[32, 32\]"),
    "scalar": (
        lambda t: t.update({"0.0.linear.weight": torch.tensor(1.0)}),
        r"0.0.linear.weight must be \['hidden', 'hidden'\], got \[\]",
    ),
    "flat output": (lambda t: t.update({"0.1.weight": torch.zeros(32)}), r"0.1.weight must be \['entries', 32\]"),
    "two vocabularies": (lambda t: t.update({"0.1.weight": torch.zeros(5, 32)}), "output heads must all be"),
    "nan": (lambda t: t["2.0.linear.bias"].fill_(float("nan")), "2.0.linear.bias holds NaN"),
    "inf": (lambda t: t["2.1.weight"].fill_(float("inf")), "2.1.weight holds NaN or infinite"),
    "integers": (lambda t: t.update({"0.0.linear.bias": torch.zeros(32, dtype=torch.int8)}), "must hold floats"),
    "map twice": (lambda t: t.update(token_map=torch.tensor([1, 1])), "holds a token twice"),
    "map of floats": (lambda t: t.update(token_map=torch.zeros(3)), "token_map must be tokens"),
    "map beyond": (lambda t: t.update(token_map=torch.tensor([1, 99])), "index 99|outside"),
    "nothing": (lambda t: [t.clear(), t.update(weight=torch.zeros(2))], "holds no Medusa heads: .* found weight"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_names_file_and_tensor(tmp_path, defect):
    spoil, message = DEFECTS[defect]
    tensors = write_tensors(random_heads(3, outputs=3), "official")
    spoil(tensors)
    save_file(tensors, tmp_path / files.HEADS)
    with pytest.raises(ValueError, match=message) as error:
        MedusaHeads.from_pretrained(tmp_path)
    assert str(tmp_path / files.HEADS) in str(error.value)


VLLM_DEFECTS = {
    "missing bias": (lambda t: t.pop("blocks.1.layers.0.bias"), {}, "lacks blocks.1.layers.0.bias"),
    "missing output": (lambda t: t.pop("lm_heads.1.weight"), {}, "lacks lm_heads.1.weight"),
    "two kinds of output": (lambda t: t.update({"lm_head.weight": torch.zeros(VOCAB, 32)}), {}, "holds lm_heads.0"),
    "no map": (lambda t: None, {"truncated_vocab_size": 7}, "says truncated_vocab_size 7, the tensors say 61"),
    "no size": (lambda t: t.update(token_map=FEW), {}, "lacks truncated_vocab_size, beside a token_map of 7"),
    "another count": (lambda t: None, {"num_heads": 5}, "says num_heads 5, the tensors say 2"),
    "another width": (lambda t: None, {"hidden_size": 64}, "says hidden_size 64, the tensors say 32"),
    "another vocabulary": (lambda t: None, {"vocab_size": 70}, "does not fit the vocab_size 70"),
    "vocabulary of words": (lambda t: None, {"vocab_size": "all"}, "vocab_size must be a whole number"),
    "scaled": (lambda t: None, {"logit_scale": 0.5}, "says logit_scale 0.5"),
    "own": (lambda t: None, {"ppd_compose": [1]}, "ppd_compose must be an object"),
    "own training": (
        lambda t: None,
        {"ppd_compose": {"training": "x"}},
        "config.json: training of ppd_compose must be",
    ),
    "own base": (lambda t: None, {"ppd_compose": {"base": {"name": "x"}}}, "lacks a field of its base"),
    "own accuracy": (lambda t: None, {"ppd_compose": {"accuracy": [[0.5]]}}, "accuracy must be 2 rows"),
    "own calibration": (lambda t: None, {"ppd_compose": {"calibration": [[0.5]]}}, "calibration must be 2 pairs"),
    "own offsets": (lambda t: None, {"ppd_compose": {"calibration": [["x", 1]] * 2}}, "calibration must be 2 pairs"),
    "own slopes": (lambda t: None, {"ppd_compose": {"calibration": [[0.0, -1.0]] * 2}}, "a slope from 0"),
    "own infinity": (lambda t: None, {"ppd_compose": {"calibration": [[0.0, 1e999]] * 2}}, "a slope from 0"),
    "own shares": (lambda t: None, {"ppd_compose": {"accuracy": [[2.0]] * 2}}, "between 0 and 1"),
}


@pytest.mark.parametrize("defect", VLLM_DEFECTS)
def test_a_defect_of_vllms_layout_or_of_a_config(tmp_path, defect):
    spoil, config, message = VLLM_DEFECTS[defect]
    named = vllm_tensors(random_heads(2, outputs=2))
    spoil(named)
    with pytest.raises(ValueError, match=message):
        MedusaHeads.from_pretrained(vllm(tmp_path, named, **config))


@pytest.mark.parametrize("file", ["medusa_lm_head.safetensors", "medusa_lm_head.pt"])
@pytest.mark.parametrize("keep", [0, 20, 2000])
def test_a_truncated_file(tmp_path, file, keep):
    official(tmp_path, random_heads(2), file)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=f"{file} is no whole file of tensors"):
        MedusaHeads.from_pretrained(tmp_path)


class Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_a_pickle_that_holds_more_than_tensors_is_refused_unread(tmp_path):
    torch.save({"0.0.linear.weight": Harmful()}, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(ValueError, match=r"medusa_lm_head.pt is no whole file of tensors"):
        MedusaHeads.from_pretrained(tmp_path)
    torch.save([torch.zeros(2)], tmp_path / "medusa_lm_head.pt")
    with pytest.raises(ValueError, match="must hold tensors by name, got list"):
        MedusaHeads.from_pretrained(tmp_path)


def test_folders_without_heads(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no Medusa heads: expected one of medusa_lm_head.safetensors"):
        MedusaHeads.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder: give a folder with"):
        MedusaHeads.from_pretrained("./nowhere")
    (tmp_path / "medusa_lm_head.safetensors").touch()
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config.json"):
            MedusaHeads.from_pretrained(tmp_path)
    for name in ("config.json", "medusa_lm_head.safetensors"):
        (tmp_path / name).unlink()
    outside = '{"weight_map": {"blocks.0.layers.0.weight": "../model.safetensors"}}'
    for text in ("{", "{}", "[]", '{"weight_map": 3}', outside):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match=r"is not JSON|holds list|no weight_map from tensors to files beside it"):
            MedusaHeads.from_pretrained(tmp_path)


@pytest.mark.parametrize("sharded", [False, True])
def test_of_a_repository_only_what_holds_heads_is_fetched(tmp_path, monkeypatch, sharded):
    heads, source, here = random_heads(2, outputs=2), tmp_path / "hub", tmp_path / "here"
    file = "model-00002-of-00002.safetensors" if sharded else "model.safetensors"
    official(source, heads, file, {**WHOLE, "medusa_num_heads": 2}, prefix="medusa_head.")
    if sharded:
        names = [f"medusa_head.{name}" for name in write_tensors(heads, "official")]
        places = dict.fromkeys(names, file) | {"lm_head.weight": "model-00001-of-00002.safetensors"}
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        save_file(BESIDE, source / "model-00001-of-00002.safetensors")
    asked = []

    def fetch(repo, *, revision, token, allow_patterns):
        asked.append((repo, revision, token))
        here.mkdir(exist_ok=True)
        for name in allow_patterns:
            if (source / name).is_file():
                shutil.copy(source / name, here / name)
        return str(here)

    monkeypatch.setattr(sources, "snapshot_download", fetch)
    same(MedusaHeads.from_pretrained("someone/heads", revision="v1", token="t"), heads)
    assert set(asked) == {("someone/heads", "v1", "t")}
    assert not (here / "model-00001-of-00002.safetensors").exists()


# What compose refuses


def test_heads_for_another_base_name_both():
    base = tiny()
    with pytest.raises(ValueError, match=r"a base of hidden size 16; they cannot be used on .*hidden 32.* have 32"):
        compose(base, MedusaHeads(random_heads(hidden=16)))
    other = Identity("other/base", 32, 99, "0")
    with pytest.raises(ValueError, match=r"other/base \(hidden 32, vocabulary 99\).*cannot be used on .*vocabulary 61"):
        compose(base, MedusaHeads(random_heads(), identity=other))
    with pytest.raises(ValueError, match="vocabulary of 100; they cannot"):
        compose(base, MedusaHeads(random_heads(token_map=torch.tensor([1, 99]))))
    with pytest.raises(ValueError, match="vocabulary of 50; they cannot"):
        compose(base, MedusaHeads(replace(random_heads(), outputs=(torch.zeros(50, 32),), vocab_size=50)))
    with pytest.raises(ValueError, match="vocabulary of 50; they cannot"):
        compose(base, MedusaHeads(replace(random_heads(), outputs=(torch.zeros(50, 32),))))
    mine = MedusaHeads(random_heads(), identity=Identity.of(tiny(seed=1)))
    with pytest.warns(UserWarning, match="the same shapes but other weights"):
        compose(base, mine)


def test_an_output_head_that_is_no_matrix_of_floats():
    base = tiny()
    base.set_output_embeddings(torch.nn.Identity())
    with pytest.raises(ValueError, match="as a matrix of floats, it is Identity: load the base with"):
        compose(base, MedusaHeads(random_heads()))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([], "choices must be different paths"),
        ([[]], "choices must be different paths"),
        ([[0], [0]], "choices must be different paths"),
        ([[0], [0, 0], [0, 0, 0]], "choices reach depth 3, there are 2 heads"),
        ([[0], [1, 0]], r"choices hold \[1, 0\] without \[1\]"),
        ([[-1]], r"choices hold \[-1\]: a rank is"),
    ],
)
def test_choices_that_are_no_tree(choices, message):
    with pytest.raises(ValueError, match=message):
        MedusaHeads(random_heads(2), choices=choices)


def test_choices_of_more_ranks_than_there_are_tokens():
    drafter = MedusaHeads(random_heads(token_map=FEW), choices=[[7]])
    with pytest.raises(ValueError, match="choices name rank 7, the heads choose from 7 tokens"):
        compose(tiny(), drafter)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": torch.zeros(2, 32, 32)}, r"must be \[heads, layers, hidden, hidden\]"),
        ({"weight": torch.zeros(2, 0, 32, 32)}, r"must be \[heads, layers"),
        ({"bias": torch.zeros(2, 1, 8)}, "biases must be"),
        ({"outputs": (torch.zeros(9, 32),) * 3}, "2 heads take 2 output heads, one or none, got 3"),
        ({"outputs": (torch.zeros(9, 16),)}, "output heads must all be"),
        ({"outputs": (torch.zeros(9, 32),), "vocab_size": 61}, "give a token_map"),
        ({"token_map": torch.zeros(0, dtype=torch.int64)}, "token_map must be"),
        ({"token_map": torch.tensor([-1])}, "tokens -1 to -1, outside"),
        ({"token_map": torch.tensor([70]), "vocab_size": 61}, "tokens 70 to 70, outside the vocabulary of 61"),
    ],
)
def test_tensors_that_do_not_belong_together(settings, message):
    with pytest.raises(ValueError, match=message):
        Heads(**{"weight": torch.zeros(2, 1, 32, 32), **settings})


# Training


def trained(base, folder, recipe=RECIPE, held=1):
    mine = replies(base)
    return train_heads(base, mine[:-held], mine[-held:], recipe, folder)


@pytest.mark.parametrize("kl", [0.0, 0.3, 1.0])
def test_the_loss_is_that_of_each_point_alone(kl):
    base = tiny()
    tokens = torch.arange(0, VOCAB, 2)
    made = replies(base, 3)
    recipe = replace(RECIPE, kl=kl, vocabulary=None)
    batches, output = Batches(base, recipe, tokens), OutputHead.of(base, tokens)
    blocks = Blocks(2, 2, 32)
    for parameter in blocks.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(3))
    batch = batches(made, 0)
    told = blocks(batch, output, 0.7, kl)
    dice = torch.Generator().manual_seed(recipe.seed * 7_368_787)
    entropy, divergence, right, known = torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(2)
    points = 0
    for reply in made:
        ids = torch.tensor(reply.ids)
        hidden = base(ids[None], output_hidden_states=True).hidden_states[-1][0]
        own = base(ids[None]).logits[0][:, tokens].float().log_softmax(-1)
        for point in train_module.draw_points(reply, recipe, 2, dice).tolist():
            points += 1
            for k in range(2):
                state = hidden[point]
                for layer in range(2):
                    weight, bias = blocks.weight[k, layer].double(), blocks.bias[k, layer].double()
                    state = state + torch.nn.functional.silu(weight @ state + bias)
                guess = (output.weight @ state).float().log_softmax(-1)
                target = own[point + 1 + k]
                divergence[k] += (target.exp() * (target - guess)).sum().detach()
                at = (tokens == ids[point + 2 + k]).nonzero()
                right[k] += guess.argmax() == at[0, 0] if len(at) else 0
                if len(at):
                    entropy[k] -= guess[at[0, 0]].detach()
                    known[k] += 1
    expected = (1 - kl) * entropy / known + kl * divergence / points
    torch.testing.assert_close(told.loss.detach(), expected[0] + 0.7 * expected[1], rtol=1e-4, atol=1e-4)
    assert told.top1.tolist() == pytest.approx((right / points).tolist())
    assert (batch.truth == OUTSIDE).any()


def test_heads_begin_as_the_bases_own_next_token():
    base = tiny(dtype=torch.float32)
    batch = Batches(base, replace(RECIPE, vocabulary=None), None)(replies(base, 2), 0)
    logits = Blocks(3, 1, 32).logits(batch, OutputHead.of(base))
    own = base.get_output_embeddings()(batch.states[batch.points])
    for head in logits:
        torch.testing.assert_close(head, own)


def test_training_lowers_the_loss_and_leaves_the_base(tmp_path):
    base = tiny(dtype=torch.float32).train()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    recipe = replace(RECIPE, steps=40, points=10)
    heads, told = trained(base, tmp_path, recipe)
    assert base.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in base.parameters())
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
    assert heads.weight.shape == (2, 2, 32, 32)
    assert heads.entries == 20
    assert np.shape(told.accuracy) == (2, 10)
    assert np.shape(told.calibration) == (2, 2)
    batch = Batches(base.eval(), recipe, heads.token_map)(replies(base)[:-1], 0)
    output, blocks = OutputHead.of(base, heads.token_map), Blocks(2, 2, 32)
    start = blocks(batch, output, 0.8, 0.5).loss.item()
    blocks.load_state_dict({"weight": heads.weight, "bias": heads.bias})
    assert blocks(batch, output, 0.8, 0.5).loss.item() < 0.8 * start


def test_claims_that_promise_too_much_hold_once_calibrated():
    """Guesses at 0.6 and 0.3 of which every second and tenth comes true."""
    log_probs = torch.tensor([0.6, 0.3]).log().expand(4000, 2)
    dice = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    right = torch.stack([dice < 0.5, (dice >= 0.5) & (dice < 0.6)], -1)
    weights = checked([fitted(log_probs, right)], 1)
    claims = np.exp(calibrated(log_probs[:1].numpy(), weights))
    np.testing.assert_allclose(claims[0], [0.5, 0.1], atol=0.02)


def test_a_calibration_that_changes_nothing():
    said = np.log([[0.5, 0.2, 0.1], [0.3, 0.3, 0.001]])
    np.testing.assert_allclose(calibrated(said, checked([[0, 1], [0, 1]], 2)), said)


def test_heads_that_were_never_right_on_held_out_replies_can_be_saved_and_loaded():
    fit = fitted(torch.full((50, 3), -1.0), torch.zeros(50, 3, dtype=torch.bool))
    assert np.isfinite(calibrated(np.full((1, 3), -1.0), checked([fit], 1))).all()


@pytest.mark.parametrize("killed_at", [1, 4, 6])
def test_killed_at_any_step_it_resumes_to_the_same_heads(tmp_path, monkeypatch, killed_at):
    base = tiny(dtype=torch.float32)
    whole, _ = trained(base, tmp_path / "whole")
    draw, count = train_module.replies_of_batch, [0]

    def fails(*args):
        count[0] += 1
        if count[0] == killed_at:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(train_module, "replies_of_batch", fails)
    with pytest.raises(KeyboardInterrupt):
        trained(base, tmp_path / "cut")
    assert all(parameter.requires_grad for parameter in base.parameters())
    count[0] = 99
    same(trained(base, tmp_path / "cut")[0], whole)


def test_heads_that_know_the_answer_are_accepted(tmp_path):
    """Overfitted to the answer's own continuation: steps are fewer than tokens, alone and beside prompt tokens."""
    base = tiny(dtype=torch.float32)
    expected = base.generate(prompt(), max_new_tokens=40, do_sample=False)
    reply = Reply(prompt()[0].tolist(), expected[0, 12:].tolist())
    recipe = replace(RECIPE, steps=80, points=40, batch_size=1, heads=3, layers=1, vocabulary=None, kl=0.0)
    heads, told = train_heads(base, [reply], [reply], recipe, tmp_path)
    assert min(row[0] for row in told.accuracy) > 0.9
    for choices in (None, [*MC_SIM_7B_63[:10], [0, 0], [0, 0, 0]]):
        for others in ([], [prompt_tokens()]):
            model = compose(base, MedusaHeads(heads, choices=choices), *others, budget=24)
            assert torch.equal(model.generate(prompt(), max_new_tokens=40, do_sample=False), expected)
            assert model.stats.accepted["medusa"].total() >= 24
            assert model.stats.forwards <= 16


def test_the_most_frequent_tokens_of_the_replies():
    made = [Reply([9, 9, 9], [4, 4, 7]), Reply([9], [7, 2, 5, 4])]
    assert frequent_tokens(made, 3).tolist() == [2, 4, 7]
    assert frequent_tokens(made, 99).tolist() == [2, 4, 5, 7]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl": 1.5}, "kl is a share"),
        ({"heads": 0}, "heads must be at least 1"),
        ({"vocabulary": 0}, "vocabulary must"),
    ],
)
def test_a_recipe_that_makes_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        MedusaRecipe(**settings)


def test_training_that_diverges_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"diverged at a learning rate of 1e\+30"):
        trained(tiny(dtype=torch.float32), tmp_path, replace(RECIPE, learning_rate=1e30))


def test_a_whole_training_writes_heads_that_load(tmp_path):
    base = tiny(dtype=torch.float32, eos=60)
    asked = [Prompt((f"{c}abcdefg",)) for c in "hijkl"]
    recipe = replace(RECIPE, vocabulary=8)
    made = train_medusa(
        base, tokenizer(), asked, tmp_path / "out", recipe, base_name="me/base", held_out=1, reply_tokens=12
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "config.json", files.HEADS]
    again = load_drafter(tmp_path / "out")
    same(again, made.heads)
    assert again.heads.weight.dtype == torch.bfloat16
    assert again.identity.name == "me/base"
    assert again.accuracy.shape == (2, 10)
    assert again.training["vocabulary"] == 8
    expected = base.generate(prompt(), max_new_tokens=20, do_sample=False)
    assert torch.equal(compose(base, again, budget=16).generate(prompt(), max_new_tokens=20, do_sample=False), expected)


def test_the_command_trains_and_writes_a_card(tmp_path):
    base = tiny(dtype=torch.float32, eos=60)
    base.generation_config.max_length = None
    base.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"{c}abcdef"}) for c in "hijkl"))
    app = typer.Typer()
    app.command()(command)
    words = [
        "--base", tmp_path / "base", "--dtype", "float32", "--prompts", tmp_path / "prompts.jsonl",
        "--out", tmp_path / "out", "--steps", 3, "--heads", 2, "--vocabulary", 0, "--reply-tokens", 12,
        "--points", 4, "--held-out", 1, "--batch-size", 2,
    ]  # fmt: skip
    told = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert told.exit_code == 0
    made = MedusaHeads.from_pretrained(tmp_path / "out")
    assert (len(made.heads), made.heads.token_map) == (2, None)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith('---\nbase_model: "base"\n')
    assert "| head | top 1 | top 2 | top 3 | top 5 | top 10 |" in card
    assert str(tmp_path) not in card + (tmp_path / "out" / "config.json").read_text()


def test_a_pickle_that_repeats_an_entry_is_refused_before_it_takes_its_memory(tmp_path):
    heads = random_heads(outputs=1)
    MedusaHeads(heads).save_pretrained(tmp_path)
    held = load_file(tmp_path / "medusa_lm_head.safetensors")
    (tmp_path / "medusa_lm_head.safetensors").unlink()
    name = next(iter(held))
    torch.save({**held, name: torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(ValueError, match="promises more entries than the file holds"):
        MedusaHeads.from_pretrained(tmp_path)


def test_a_static_tree_claims_as_much_as_one_of_any_shape():
    base = tiny(dtype=torch.float32)
    heads, calibration = random_heads(2), [[-1.0, 0.8], [-0.5, 0.9]]
    seen = []

    class Sees:
        @hookimpl
        def merge(self, trees):
            seen.append({int(t): float(p) for t, p in zip(trees[1].tokens[1:], trees[1].log_probs[1:], strict=True)})

    for choices in (None, [[0], [1]]):
        made = MedusaHeads(heads, calibration=calibration, choices=choices)
        compose(base, made, plugins=[Sees()], budget=64).generate(prompt(), max_new_tokens=2, do_sample=False)
    dynamic, static = seen
    assert len(static) == 2
    assert all(dynamic[token] == pytest.approx(claim) for token, claim in static.items())


def test_a_calibration_is_on_the_host_whatever_the_default_device():
    with torch.device("meta"):
        weights = checked([[-1.0, 0.8]], 1)
        fit = fitted(torch.full((5, 2), -1.0, device="cpu"), torch.zeros(5, 2, dtype=torch.bool, device="cpu"))
    assert np.isfinite(calibrated(np.log([[0.5, 0.2]]), weights)).all()
    assert np.isfinite(fit).all()
