"""Prompt tokens in PEFT: trained, saved, found, switched and removed as people handle LoRA adapters."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tiny import prompt, tiny
from transformers import AutoModelForCausalLM

from ppd_compose import PPDConfig, PromptTokens, compose
from ppd_compose.peft_method import PPDEmbedding


@pytest.fixture
def folder(tmp_path):
    """A base that was saved."""
    tiny(dtype=torch.float32).save_pretrained(tmp_path / "base")
    return tmp_path


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "base")


def peft_model(base, seed=0, **settings):
    """Prompt tokens of random rows, as after a training."""
    model = get_peft_model(base, PPDConfig(**settings))
    scatter(model, seed)
    return model


def scatter(model, seed, adapter="default"):
    dice = torch.Generator().manual_seed(seed)
    rows = embedding(model).ppd_embeddings[adapter]
    rows.data = torch.randn(rows.shape, generator=dice)


def embedding(model):
    return next(module for module in model.modules() if isinstance(module, PPDEmbedding))


def rows_of(model, adapter="default"):
    return embedding(model).ppd_embeddings[adapter]


def greedy(model, tokens=12):
    return model.generate(input_ids=prompt(), attention_mask=torch.ones_like(prompt()), max_new_tokens=tokens,
                          do_sample=False)  # fmt: skip


def test_only_the_rows_are_trained_and_the_base_says_what_it_said(folder, capsys):
    expected = greedy(loaded(folder))
    model = peft_model(loaded(folder), num_prompt_tokens=3, ensemble=2)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.model.embed_tokens.ppd_embeddings.default"
    ]
    model.print_trainable_parameters()
    assert "trainable params: 192 ||" in capsys.readouterr().out
    assert torch.equal(greedy(model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trips_are_bit_for_bit_over_every_path(folder, dtype):
    model = peft_model(loaded(folder).to(dtype), num_prompt_tokens=2, ensemble=3)
    rows = rows_of(model).detach().clone()
    model.save_pretrained(folder / "adapter")

    def base():
        return loaded(folder).to(dtype)

    native = base()
    native.load_adapter(str(folder / "adapter"))
    paths = {
        "PeftModel": rows_of(PeftModel.from_pretrained(base(), folder / "adapter")),
        "transformers": rows_of(native),
        "auto": rows_of(AutoModelForCausalLM.from_pretrained(folder / "adapter", dtype=dtype)),
        "ours": PromptTokens.from_pretrained(folder / "adapter").embeddings.flatten(0, 1),
        "live": PromptTokens.from_pretrained(model).embeddings.flatten(0, 1),
        "live, by transformers": PromptTokens.from_pretrained(native).embeddings.flatten(0, 1),
    }
    for path, found in paths.items():
        assert torch.equal(found, rows), path
        assert found.dtype == torch.float32, path
    assert PromptTokens.from_pretrained(folder / "adapter").embeddings.shape == (2, 3, 32)


def test_what_we_save_peft_loads_and_what_peft_saves_again_is_the_same(folder):
    model = peft_model(loaded(folder))
    tokens = PromptTokens.from_pretrained(model)
    tokens = PromptTokens(tokens.embeddings, [[0.5, 0.1], [0.3, 0.1], [0.2, 0.1]], tokens.identity)
    tokens.save_pretrained(folder / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = PeftModel.from_pretrained(loaded(folder), folder / "ours")
        again.save_pretrained(folder / "peft", save_embedding_layers=False)
    first, second = (PromptTokens.from_pretrained(folder / name) for name in ("ours", "peft"))
    assert torch.equal(first.embeddings, second.embeddings)
    assert (first.accuracy == second.accuracy).all()
    assert first.identity == second.identity


@pytest.mark.parametrize("name", ["ppd", "ppd_embeddings", "embed_tokens", "model", "one-two_3"])
def test_an_adapter_may_have_any_name(folder, name):
    model = get_peft_model(loaded(folder), PPDConfig(num_prompt_tokens=2), adapter_name=name)
    with torch.no_grad():
        rows_of(model, name).normal_()
    model.save_pretrained(folder / "saved")
    again = PeftModel.from_pretrained(loaded(folder), folder / "saved" / name, adapter_name=name)
    assert torch.equal(rows_of(again, name), rows_of(model, name))
    assert torch.equal(PromptTokens.from_pretrained(again).embeddings.flatten(0, 1), rows_of(model, name))
    assert torch.equal(PromptTokens.from_pretrained(folder / "saved" / name).embeddings[:, 0], rows_of(model, name))


def test_several_adapters_are_switched_deleted_disabled_and_unloaded(folder):
    for name, seed in (("one", 1), ("two", 2)):
        model = peft_model(loaded(folder), seed)
        model.save_pretrained(folder / name)
    base = loaded(folder)
    expected = greedy(base)
    model = PeftModel.from_pretrained(base, folder / "one", adapter_name="one")
    model.load_adapter(folder / "two", adapter_name="two")

    def active():
        return PromptTokens.from_pretrained(model).embeddings.flatten(0, 1)

    first, second = (rows_of(model, name).detach().clone() for name in ("one", "two"))
    assert torch.equal(active(), first)
    model.set_adapter("two")
    assert torch.equal(active(), second)
    assert torch.equal(PromptTokens.from_pretrained(model, adapter_name="one").embeddings.flatten(0, 1), first)
    composed = compose(model.get_base_model(), PromptTokens.from_pretrained(model), budget=12)
    assert torch.equal(composed.generate(prompt(), max_new_tokens=12, do_sample=False), expected)
    with pytest.raises(ValueError, match=r"called 'three', there are \['one', 'two'\]"):
        PromptTokens.from_pretrained(model, adapter_name="three")
    model.delete_adapter("one")
    assert torch.equal(active(), second)
    with model.disable_adapter():
        assert torch.equal(greedy(model), expected)
    plain = model.unload()
    assert type(plain.get_input_embeddings()) is torch.nn.Embedding
    assert torch.equal(greedy(plain), expected)
    with pytest.raises(ValueError, match="holds no prompt tokens"):
        PromptTokens.from_pretrained(plain)


def test_prompt_tokens_cannot_be_merged_into_weights(folder):
    with pytest.raises(ValueError, match=r"cannot be merged: use unload\(\)"):
        peft_model(loaded(folder)).merge_and_unload()


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer")  # LoRA's, of older PEFT
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]])
def test_prompt_tokens_on_top_of_lora(folder, targets):
    """Also where LoRA changes the embedding that prompt tokens stand beside."""
    lora = get_peft_model(loaded(folder), LoraConfig(target_modules=targets, init_lora_weights=False))
    tuned = lora.get_base_model()
    expected = greedy(tuned)
    assert not torch.equal(expected, greedy(loaded(folder)))
    del tuned.peft_config  # PEFT's mark that adapters are there
    model = peft_model(tuned)
    assert torch.equal(greedy(model), expected)
    composed = compose(model.get_base_model(), PromptTokens.from_pretrained(model), budget=12)
    assert torch.equal(composed.generate(prompt(), max_new_tokens=12, do_sample=False), expected)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_lora_on_top_of_prompt_tokens_through_transformers(folder):
    get_peft_model(loaded(folder), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(
        folder / "lora"
    )
    peft_model(loaded(folder)).save_pretrained(folder / "prompts")
    expected = greedy(PeftModel.from_pretrained(loaded(folder), folder / "lora"))
    model = loaded(folder)
    model.load_adapter(str(folder / "prompts"), adapter_name="prompts")
    model.load_adapter(str(folder / "lora"), adapter_name="tuned")
    tokens = PromptTokens.from_pretrained(model, adapter_name="prompts")
    composed = compose(model, tokens, budget=12)
    assert torch.equal(composed.generate(prompt(), max_new_tokens=12, do_sample=False), expected)


def test_adding_prompt_tokens_to_a_lora_peft_model_is_refused_by_peft(folder):
    model = get_peft_model(loaded(folder), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("prompts", PPDConfig())


def test_an_adapter_of_another_base_is_refused_when_peft_loads_it(folder):
    peft_model(loaded(folder)).save_pretrained(folder / "adapter")
    path = folder / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base": {**config["base"], "vocab_size": 99, "name": "org/other"}}))
    with pytest.raises(ValueError, match=r"org/other \(hidden 32, vocabulary 99\).*hidden 32, vocabulary 61"):
        PeftModel.from_pretrained(loaded(folder), folder / "adapter")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_prompt_tokens": 0}, "num_prompt_tokens must be a whole number of at least 1, got 0"),
        ({"ensemble": "two"}, "ensemble must be a whole number of at least 1, got 'two'"),
        ({"format_version": 9}, "format_version is 9"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PPDConfig(**settings)


def test_a_configuration_comes_back_as_its_own_kind(folder):
    peft_model(loaded(folder), num_prompt_tokens=5).save_pretrained(folder / "adapter")
    config = PeftConfig.from_pretrained(folder / "adapter")
    assert isinstance(config, PPDConfig)
    assert config.num_prompt_tokens == 5
    assert config.task_type == "CAUSAL_LM"
