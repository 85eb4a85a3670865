"""Files of EAGLE heads: every layout is read, what is written comes back bit for bit, and nothing loads half."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ppd_compose.integrations.eagle import EagleHead
from ppd_compose.integrations.eagle.config import LAYER_IDS
from ppd_compose.integrations.eagle.files import read_head
from safetensors.torch import load_file, save_file
from test_eagle import LAYER, random_head
from tiny import VOCAB, prompt, tiny

from ppd_compose import compose, load_drafter, sources
from ppd_compose.identity import Identity

FIXTURES = Path(__file__).parent / "fixtures"
FLAT = {**LAYER, "vocab_size": VOCAB, "num_hidden_layers": 1, "model_type": "llama"}


def saved(folder, version=3, **settings):
    """A folder in the official layout."""
    settings = {"own": ("embedding",) if version == 1 else ("lm_head",), **settings}
    EagleHead(random_head(version, **settings)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["ppd_compose"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def changed(folder, *, drop=(), config=None, **tensors):
    """The same folder with other tensors and fields."""
    held = load_file(folder / "model.safetensors")
    held = {name: tensor for name, tensor in held.items() if name not in drop} | tensors
    save_file(held, folder / "model.safetensors")
    fields = json.loads((folder / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps({n: v for n, v in fields.items() if n not in drop}))
    return folder


def as_bin(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_shards(folder):
    held = load_file(folder / "model.safetensors")
    names = sorted(held)
    shards = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, mine in shards.items():
        save_file({name: held[name] for name in mine}, folder / file)
    places = {name: file for file, mine in shards.items() for name in mine}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "model.safetensors").unlink()


def as_bin_shards(folder):
    as_shards(folder)
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for file in set(places.values()):
        torch.save(load_file(folder / file), folder / file.replace(".safetensors", ".bin"))
        (folder / file).unlink()
    places = {name: file.replace(".safetensors", ".bin") for name, file in places.items()}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "model.safetensors.index.json").unlink()


def as_speculators(folder):
    """Nested configuration, layers.0 for midlayer, an embedding and copies of the base's parts in the file."""
    held = {n.replace("midlayer.", "layers.0."): t for n, t in load_file(folder / "model.safetensors").items()}
    held["embed_tokens.weight"] = torch.randn(VOCAB, 32)
    held["verifier_norm.weight"] = torch.ones(32)
    save_file(held, folder / "model.safetensors")
    flat = json.loads((folder / "config.json").read_text())
    config = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": flat.pop("draft_vocab_size"),
        "transformer_layer_config": flat | {"model_type": "llama"},
        LAYER_IDS: [1, 1, 2],
    }
    (folder / "config.json").write_text(json.dumps(config))


def same(mine, other):
    assert mine.network.keys() == other.network.keys()
    assert all(torch.equal(tensor, other.network[name]) for name, tensor in mine.network.items())
    for field in ("embedding", "lm_head", "target_ids"):
        one, two = getattr(mine, field), getattr(other, field)
        assert (one is None) == (two is None), field
        assert one is None or (torch.equal(one, two) and one.dtype == two.dtype)


@pytest.mark.parametrize("layout", [None, as_bin, as_shards, as_bin_shards])
@pytest.mark.parametrize("version", [1, 3])
def test_official_layouts(tmp_path, version, layout):
    saved(tmp_path, version)
    if layout:
        layout(tmp_path)
    head = read_head(tmp_path)
    assert head.config.version == version
    assert head.identity is None
    same(head, random_head(version, own=("embedding",) if version == 1 else ("lm_head",)))
    base = tiny()
    model = compose(base, EagleHead(head), budget=16)
    expected = base.generate(prompt(), max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(prompt(), max_new_tokens=8, do_sample=False), expected)


@pytest.mark.parametrize("layout", [None, as_shards])
def test_the_speculators_layout(tmp_path, layout):
    as_speculators(saved(tmp_path))
    if layout:
        layout(tmp_path)
    head, expected = read_head(tmp_path), random_head(3, own=("lm_head",))
    same(replace(head, embedding=None), expected)
    assert head.embedding.shape == (VOCAB, 32)
    assert head.config.layers == (1, 1, 2)
    assert head.config.draft_vocab_size == 40
    compose(tiny(), EagleHead(head), budget=16).generate(prompt(), max_new_tokens=4, do_sample=False)


def test_layer_ids_of_both_countings(tmp_path):
    """vLLM names the input of a layer, SGLang and SpecForge the layer whose output is that input."""
    saved(tmp_path)
    assert read_head(tmp_path).config.reads(3) == (1, 1, 2)
    assert read_head(tmp_path).config.reads(32) == (2, 16, 29)
    assert read_head(changed(tmp_path, config={LAYER_IDS: [0, 1, 2]})).config.reads(3) == (0, 1, 2)
    changed(tmp_path, drop=(LAYER_IDS,), config={"eagle_config": {LAYER_IDS: [0, 0, 1], "use_aux_hidden_state": True}})
    assert read_head(tmp_path).config.reads(3) == (1, 1, 2)


@pytest.mark.parametrize(
    ("version", "settings"),
    [
        (1, {}),
        (1, {"own": (), "biases": frozenset({"fc", "qkv"})}),
        (3, {}),
        (3, {"own": ("embedding", "lm_head")}),
        (3, {"draft": VOCAB, "qk_norm": True, "biases": frozenset({"qkv", "o", "mlp"})}),
        (3, {"layers": (0, 2), "states": 2, "norm_before_fc": True, "norm_before_residual": True}),
        (3, {"fc_norm": True, "norm_output": True, "layer": {**LAYER, "head_dim": 6, "rope_theta": 5e5}}),
        (3, {"layer": {**LAYER, "hidden_size": 24}, "own": ("embedding", "lm_head")}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_comes_back_bit_for_bit(tmp_path, version, settings, dtype):
    head = random_head(version, **settings)
    head = replace(
        head,
        network={name: tensor.to(dtype) for name, tensor in head.network.items()},
        identity=Identity("some/base", 32, VOCAB, "f" * 16),
        accuracy=(0.7, 0.5),
        training={"steps": 3, "seconds": 0, "command": "ppd-compose train eagle --steps 3"},
    )
    EagleHead(head).save_pretrained(tmp_path)
    back = EagleHead.from_pretrained(tmp_path, depth=2).head
    same(back, head)
    assert (back.identity, back.accuracy, back.training) == (head.identity, head.accuracy, head.training)
    for field in ("version", "draft_vocab_size", "state_size", "states", "layers", "biases", "qk_norm", "fc_norm"):
        assert getattr(back.config, field) == getattr(head.config, field), field
    assert {**back.config.layer} == {**head.config.layer}
    card = (tmp_path / "README.md").read_text()
    assert card.startswith('---\nbase_model: "some/base"\n')
    assert "| 1 | 0.700 |" in card
    assert "`ppd-compose train eagle --steps 3`" in card
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    EagleHead(back).save_pretrained(tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_full_draft_vocabulary_with_empty_maps(tmp_path):
    """As the official code writes it when the draft guesses every token."""
    saved(tmp_path, draft=VOCAB)
    changed(tmp_path, d2t=torch.zeros(VOCAB, dtype=torch.long), t2d=torch.zeros(VOCAB, dtype=torch.bool))
    assert read_head(tmp_path).target_ids is None


@pytest.mark.parametrize("version", [1, 3])
def test_every_tensor_that_is_missing_misshapen_or_not_finite_is_named(tmp_path, version):
    whole = saved(tmp_path / "whole", version)
    held = load_file(whole / "model.safetensors")
    needed = set(held) - {"embed_tokens.weight", "lm_head.weight", "t2d"}
    for number, (name, tensor) in enumerate(sorted(held.items())):
        inner = name.replace("midlayer.", "layer.").replace("layers.0.", "layer.")
        for fault in ("missing", "shape", "nan"):
            if (fault == "missing" and name not in needed) or (fault == "nan" and not tensor.is_floating_point()):
                continue
            folder = tmp_path / f"{number}-{fault}"
            shutil.copytree(whole, folder)
            wrong = torch.cat([tensor, tensor]) if fault == "shape" else tensor * float("nan")
            changed(folder, drop=(name,) if fault == "missing" else (), **({} if fault == "missing" else {name: wrong}))
            with pytest.raises(ValueError, match=r"model\.safetensors") as raised:
                read_head(folder)
            assert inner in str(raised.value)


@pytest.mark.parametrize("version", [1, 3])
def test_a_surplus_tensor_is_named(tmp_path, version):
    changed(saved(tmp_path, version), **{"layers.1.mlp.up_proj.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"holds layers.1.mlp.up_proj.weight, which no EAGLE-\d head"):
        read_head(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": None}, "hidden_size must be a whole number of at least 1, got None"),
        ({"vocab_size": "61"}, "vocab_size must be a whole number"),
        ({"head_dim": 2**31}, "head_dim must be a whole number"),
        ({"rope_theta": 10**400}, "rope_theta must be a number above 0"),
        ({"rope_parameters": "x"}, "rope_parameters must be a dict"),
        (
            {
                "speculators_model_type": "eagle3",
                "rope_parameters": {},
                "transformer_layer_config": {**FLAT, "rope_parameters": "x"},
            },
            "rope_parameters must be a dict",
        ),
        ({"num_hidden_layers": 2}, "num_hidden_layers=2, which a head here cannot do"),
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, r"rope_type='spiral' .known are default, linear"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"rope_type": "yarn"}}, r"config.json describes a layer that cannot be built: .*factor"),
        ({"num_attention_heads": 5}, r"config.json describes a layer that cannot be built: Class validation"),
        ({"hidden_act": "swirl"}, "hidden_act='swirl'"),
        ({"layer_types": ["sliding_attention"]}, "sliding_attention"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"logit_scale": 0.5}, "logit_scale=0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state=false"),
        ({"speculators_model_type": "peagle"}, "speculator of kind 'peagle'"),
        ({"speculators_model_type": "eagle3"}, "has no transformer_layer_config"),
        ({"norm_before_fc": True, "fc_norm": True}, "sets norm_before_fc and fc_norm"),
        ({"norm_before_fc": True}, "lacks input_norm.weight"),
        ({"fc_norm": True}, "lacks fc_norm.0.weight, fc_norm.1.weight"),
        ({"qkv_bias": True}, "lacks layer.self_attn.k_proj.bias"),
        ({LAYER_IDS: [1, "two", 3]}, "they must be layer numbers"),
        ({LAYER_IDS: [1, 2]}, r"fc.weight is \(32, 96\), config.json promises \(32, 64\)"),
        ({"draft_vocab_size": 39}, r"d2t is \(40,\), config.json promises \(39,\)"),
        ({"ppd_compose": {"format": 2}}, "'ppd_compose' is not of format 1, which this version reads: .'format': 2."),
        ({"ppd_compose": "yes"}, "'ppd_compose' is not of format 1"),
        ({"ppd_compose": {"format": 1, "base": {"nme": "x"}}}, "a field of 'ppd_compose' is wrong"),
        ({"ppd_compose": {"format": 1, "training": "x"}}, r"config.json: a field of .* must be an object, got str"),
        ({"ppd_compose": {"format": 1, "training": None}}, "training must be an object, got NoneType"),
    ],
)
def test_a_configuration_that_cannot_be_honoured_is_refused_by_name(tmp_path, config, message):
    changed(saved(tmp_path), config=config)
    with pytest.raises(ValueError, match=message):
        read_head(tmp_path)


def test_a_head_is_not_saved_beside_the_index_of_another(tmp_path):
    as_shards(saved(tmp_path))
    with pytest.raises(ValueError, match=r"holds model.safetensors.index.json, which would be read instead"):
        EagleHead(random_head()).save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_norm_that_version_1_does_not_have(tmp_path):
    changed(saved(tmp_path, 1), config={"norm_output": True})
    with pytest.raises(ValueError, match=r"sets \['norm_output'\], which a head of EAGLE-1 does not have"):
        read_head(tmp_path)


def test_maps_that_contradict_themselves(tmp_path):
    saved(tmp_path)
    d2t, t2d = (load_file(tmp_path / "model.safetensors")[name] for name in ("d2t", "t2d"))
    for wrong in (d2t - 99, d2t + 60, torch.arange(40).neg()):
        with pytest.raises(ValueError, match="d2t does not map"):
            read_head(changed(tmp_path, d2t=wrong))
    with pytest.raises(ValueError, match="t2d marks other tokens"):
        read_head(changed(tmp_path, d2t=d2t, t2d=~t2d))
    with pytest.raises(ValueError, match=r"lacks d2t: config.json promises 40 draft tokens of 61"):
        read_head(changed(tmp_path, drop=("d2t", "t2d")))


def test_files_that_are_no_head(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        read_head(tmp_path / "nowhere" / "at" / "all")
    with pytest.raises(FileNotFoundError, match=r"holds none of model.safetensors.index.json"):
        read_head(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        read_head(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_head(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds list"):
        read_head(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(FLAT))
    with pytest.raises(ValueError, match="is no whole file of tensors"):
        read_head(tmp_path)
    save_file({"0.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds no draft layer .*it is no EAGLE head: 0.weight"):
        read_head(tmp_path)


def test_a_pickle_is_not_executed(tmp_path):
    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harmed",))

    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"fc.weight": Harm()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is no whole file of tensors"):
        read_head(tmp_path)
    assert not (tmp_path / "harmed").exists()
    torch.save([1, 2], tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must hold tensors by name, got list"):
        read_head(tmp_path)


def test_shards_that_do_not_fit_their_index(tmp_path):
    as_shards(saved(tmp_path))
    held = load_file(tmp_path / "model-1-of-2.safetensors")
    save_file({name: held[name] for name in list(held)[1:]}, tmp_path / "model-1-of-2.safetensors")
    with pytest.raises(ValueError, match=rf"model-1-of-2.safetensors lacks {next(iter(held))}"):
        read_head(tmp_path)
    (tmp_path / "model-1-of-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"index.json names it"):
        read_head(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"fc.weight": "../secret.safetensors"}}')
    with pytest.raises(ValueError, match="has no weight_map from tensors to files beside it"):
        read_head(tmp_path)


def test_weights_of_eight_bits_are_refused(tmp_path):
    saved(tmp_path)
    norm = load_file(tmp_path / "model.safetensors")["norm.weight"]
    with pytest.raises(ValueError, match=r"norm.weight is torch.int8"):
        read_head(changed(tmp_path, **{"norm.weight": norm.to(torch.int8)}))


@pytest.mark.parametrize("version", [1, 3])
def test_folders_are_told_apart_by_their_contents(tmp_path, version):
    saved(tmp_path, version)
    assert isinstance(load_drafter(tmp_path), EagleHead)
    EagleHead(random_head(version)).save_pretrained(tmp_path)
    assert isinstance(load_drafter(tmp_path), EagleHead)


def test_what_is_recognised():
    knows = EagleHead.recognises
    assert knows({"speculators_model_type": "eagle3"}, {"config.json"})
    assert not knows({"speculators_model_type": "dflash", "draft_vocab_size": 9}, {"config.json"})
    assert knows({**FLAT, "draft_vocab_size": 9}, {"config.json", "tokenizer.json"})
    assert knows(FLAT, {"config.json", "pytorch_model.bin"})
    assert not knows(FLAT, {"config.json", "model.safetensors", "tokenizer.json"})  # a model of one layer
    assert knows({**FLAT, "ppd_compose": {"kind": "eagle"}}, {"config.json", "tokenizer.json"})
    assert not knows({"model_type": "medusa", "num_hidden_layers": 1, "num_heads": 4}, {"config.json"})
    assert not knows({**FLAT, "num_hidden_layers": 2}, {"config.json", "model.safetensors"})
    assert not knows({"peft_type": "PPD"}, {"adapter_config.json"})
    assert not knows({}, set())


def test_the_hub_is_asked_for_safetensors_first(tmp_path, monkeypatch):
    """Pickles come only where there is nothing else."""
    asked = []

    def snapshot_download(repo, **settings):
        asked.append((repo, settings["revision"], settings["token"], settings["allow_patterns"]))
        return str(tmp_path)

    monkeypatch.setattr(sources, "snapshot_download", snapshot_download)
    saved(tmp_path)
    read_head("someone/head", revision="v1", token="t")
    assert [ask[:3] for ask in asked] == [("someone/head", "v1", "t")]
    assert not any("bin" in pattern for pattern in asked[0][3])
    as_bin(tmp_path)
    read_head("someone/head")
    assert "pytorch_model*.bin" in asked[-1][3]


def test_a_pickle_that_repeats_an_entry_is_refused_before_it_takes_its_memory(tmp_path):
    saved(tmp_path, 1)
    held = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save({**held, min(held): torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="promises more entries than the file holds"):
        read_head(tmp_path)
