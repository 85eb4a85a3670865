"""Draft models saved, shared and composed anew: their weights, or where on the Hub these are."""

import json

import pytest
import torch
from loopback import TOKEN
from peft import LoraConfig, get_peft_model
from ppd_compose.integrations.draft_model import DraftModel
from test_compose import tokenizer
from tiny import prompt, prompt_tokens, tiny
from transformers import AutoModelForCausalLM

from ppd_compose import PromptTokens, compose, compose_from_pretrained, load_drafter
from ppd_compose.identity import Identity


def prompts_for(draft):
    made = prompt_tokens(2)
    return PromptTokens(made.embeddings, made.accuracy.tolist(), Identity.of(draft))


def same(first, second):
    one, other = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert first.settings == second.settings
    assert (first.prompt_tokens is None) == (second.prompt_tokens is None)
    if first.prompt_tokens is not None:
        assert torch.equal(first.prompt_tokens.embeddings, second.prompt_tokens.embeddings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("carries", [False, True])
def test_a_composition_holds_the_weights_of_a_draft_model_made_here(tmp_path, dtype, carries):
    base, draft = tiny(dtype=dtype), tiny(seed=5, dtype=dtype)
    drafter = DraftModel(draft, depth=5, width=2, prompt_tokens=prompts_for(draft) if carries else None)
    model = compose(base, drafter, "lookup", budget=12)
    model.save_composition(tmp_path / "saved")
    again = compose_from_pretrained(tmp_path / "saved", base)
    same(again.plugins.drafters["draft-model"], drafter)
    same(load_drafter(tmp_path / "saved" / "draft-model"), DraftModel(draft, prompt_tokens=drafter.prompt_tokens))
    expected = base.generate(prompt(), max_new_tokens=12, do_sample=False)
    assert torch.equal(again.generate(prompt(), max_new_tokens=12, do_sample=False), expected)


def test_a_draft_model_is_loaded_in_inference_mode(tmp_path):
    DraftModel(tiny(seed=5, dtype=torch.float32)).save_pretrained(tmp_path / "draft")
    base = tiny(dtype=torch.float32)
    expected = base.generate(prompt(), max_new_tokens=12, do_sample=False)
    with torch.inference_mode():
        drafter = DraftModel.from_pretrained(tmp_path / "draft")
        assert torch.equal(compose(base, drafter, budget=12).generate(prompt(), max_new_tokens=12), expected)


def test_of_one_from_the_hub_the_repository_and_its_commit_are_saved(hub, tmp_path):
    tiny(seed=5, dtype=torch.float32).push_to_hub("user/draft")
    tokenizer().push_to_hub("user/draft")
    drafter = DraftModel.from_pretrained("user/draft", depth=3)
    drafter.prompt_tokens = prompts_for(drafter.model)
    drafter.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.safetensors"))
    told = json.loads((tmp_path / "saved" / "draft_origin.json").read_text())
    assert told == {"source": "user/draft", "revision": drafter.origin.revision}
    tiny(seed=6, dtype=torch.float32).push_to_hub("user/draft")
    for load in (DraftModel.from_pretrained, load_drafter):
        again = load(tmp_path / "saved")
        same(again, DraftModel(drafter.model, prompt_tokens=drafter.prompt_tokens))
        assert again.origin == drafter.origin
        assert again.tokenizer.get_vocab() == drafter.tokenizer.get_vocab()


def test_of_one_from_the_hub_that_was_changed_all_is_saved(hub, tmp_path):
    tiny(seed=5, dtype=torch.float32).push_to_hub("user/draft")
    drafter = DraftModel.from_pretrained("user/draft", tokenizer=tokenizer())
    drafter.save_pretrained(tmp_path / "words")  # only the tokenizer is another
    assert sorted(path.suffix for path in (tmp_path / "words").iterdir()) == [".json"] * 3
    again = DraftModel.from_pretrained(tmp_path / "words")
    assert again.tokenizer.get_vocab() == tokenizer().get_vocab()
    with torch.no_grad():
        drafter.model.lm_head.weight.mul_(2)
    drafter.save_pretrained(tmp_path / "whole")
    again = DraftModel.from_pretrained(tmp_path / "whole")
    assert again.origin is None
    assert torch.equal(again.model.lm_head.weight, drafter.model.lm_head.weight)


def test_a_composition_names_a_private_draft_model_and_the_token_opens_it(hub, tmp_path, monkeypatch):
    base = tiny(dtype=torch.float32)
    tiny(seed=5, dtype=torch.float32).push_to_hub("user/draft", private=True)
    compose(base, DraftModel.from_pretrained("user/draft"), budget=8).save_composition(tmp_path / "saved")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "other"))
    with pytest.raises(OSError, match="user/draft"):
        compose_from_pretrained(tmp_path / "saved", base)
    again = compose_from_pretrained(tmp_path / "saved", base, token=TOKEN)
    expected = base.generate(prompt(), max_new_tokens=8, do_sample=False)
    assert torch.equal(again.generate(prompt(), max_new_tokens=8, do_sample=False), expected)


def test_a_draft_model_is_pushed_and_pulled_with_its_prompt_tokens(hub):
    draft = tiny(seed=5, dtype=torch.float32)
    drafter = DraftModel(draft, prompt_tokens=prompts_for(draft), tokenizer=tokenizer())
    drafter.push_to_hub("user/draft")
    same(load_drafter("user/draft"), drafter)
    assert AutoModelForCausalLM.from_pretrained("user/draft").config.vocab_size == draft.config.vocab_size


@pytest.mark.parametrize(
    "told",
    ["{", "[]", "{}", '{"source": 3, "revision": "x"}', '{"source": "/etc", "revision": "x"}', '{"source": "a"}'],
)
def test_a_note_that_names_no_repository_is_refused(tmp_path, told):
    (tmp_path / "draft_origin.json").write_text(told)
    with pytest.raises(ValueError, match=r"draft_origin.json"):
        load_drafter(tmp_path)


def test_a_draft_model_is_not_saved_over_something_else(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(FileExistsError, match="holds something already"):
        DraftModel(tiny()).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_draft_model_that_carries_adapters_is_not_saved_without_them(tmp_path):
    draft = tiny(dtype=torch.float32)
    wrapped = get_peft_model(draft, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(ValueError, match=r"carries adapters, .*: merge them"):
        DraftModel(draft).save_pretrained(tmp_path / "draft")
    assert not (tmp_path / "draft").exists()
    DraftModel(wrapped.merge_and_unload()).save_pretrained(tmp_path / "draft")
    assert torch.equal(load_drafter(tmp_path / "draft").model(prompt()).logits, draft(prompt()).logits)
