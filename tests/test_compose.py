"""What compose returns, what it leaves alone and what it refuses."""

import copy
import pickle
import string
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import FAMILIES, Oracle, continuing, prompt, prompt_tokens, tiny
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)

from ppd_compose import Budget, PromptTokens, compose, generation, hookimpl, refuse
from ppd_compose.cache import GENERATE_NAME
from ppd_compose.measured import measured_budget


def tokenizer():
    """One token a character."""
    characters = "?" + string.ascii_letters + "01234567"
    inner = Tokenizer(WordLevel({c: i for i, c in enumerate(characters)}, unk_token="?"))
    inner.pre_tokenizer, inner.decoder = Split("", "isolated"), Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?", pad_token="?")


def test_the_result_is_of_the_bases_class_and_shares_its_weights():
    base = tiny()
    model = compose(base, prompt_tokens(), budget=8)
    assert isinstance(model, type(base))
    assert type(model).__name__ == type(base).__name__
    assert all(a is b for a, b in zip(model.parameters(), base.parameters(), strict=True))
    assert model.config is base.config


def test_the_base_is_left_as_it_was():
    base = tiny()
    before, names = {k: v.clone() for k, v in base.state_dict().items()}, set(vars(base))
    inner = {name: set(vars(module)) for name, module in base.named_modules()}
    config, logits = copy.deepcopy(base.config.to_dict()), base(prompt()).logits
    model = compose(base, prompt_tokens(3, 2), budget=32)
    model.generate(prompt(), max_new_tokens=20, do_sample=False)
    model.something, model.generation_config.top_k = 1, 7
    model.register_forward_hook(lambda *_: pytest.fail("a hook of the composition ran"))
    assert set(vars(base)) == names
    assert {name: set(vars(module)) for name, module in base.named_modules()} == inner
    assert base.config.to_dict() == config
    assert base.generation_config.top_k != 7
    assert all(torch.equal(before[k], v) for k, v in base.state_dict().items())
    assert torch.equal(base(prompt()).logits, logits)


def test_the_base_is_left_as_it_was_after_an_exception_in_the_middle():
    class Fails:
        @hookimpl
        def observe(self, step):
            if step.index == 3:
                raise KeyboardInterrupt

    base = tiny()
    expected = base.generate(prompt(), max_new_tokens=20, do_sample=False)
    model = compose(base, prompt_tokens(), Fails(), budget=16)
    with pytest.raises(KeyboardInterrupt):
        model.generate(prompt(), max_new_tokens=20, do_sample=False)
    assert torch.equal(base.generate(prompt(), max_new_tokens=20, do_sample=False), expected)
    assert torch.equal(compose(base, budget=4).generate(prompt(), max_new_tokens=20, do_sample=False), expected)


def test_two_compositions_of_one_base_and_one_drafter_are_independent():
    base, shared = tiny(), prompt_tokens()
    ids, other = prompt(), prompt(seed=5)
    one, two = compose(base, shared, budget=8), compose(base, shared, budget=32)
    expected = base.generate(ids, max_new_tokens=15, do_sample=False)
    turns = []

    class Interleaves:
        """Lets the second model decode something in the middle of the first one's generation."""

        @hookimpl
        def observe(self, step):
            turns.append(two.generate(other, max_new_tokens=5, do_sample=False))

    mixed = compose(base, shared, plugins=[Interleaves()], budget=8)
    assert torch.equal(mixed.generate(ids, max_new_tokens=15, do_sample=False), expected)
    alone = base.generate(other, max_new_tokens=5, do_sample=False)
    assert all(torch.equal(turn, alone) for turn in turns)
    one.generate(ids, max_new_tokens=15, do_sample=False)
    assert one.stats.tokens == 15
    assert two.stats.tokens == 5


def test_a_pipeline_takes_it():
    base = tiny()
    words = tokenizer()
    settings = {"max_new_tokens": 10, "do_sample": False, "return_full_text": False}
    answers = []
    for model in (base, compose(base, prompt_tokens(), budget=16)):
        model.generation_config.max_length = None
        answers.append(pipeline("text-generation", model=model, tokenizer=words)("abcdefg", **settings))
    assert answers[0] == answers[1]


def test_stop_strings_end_the_answer_where_generate_ends_it():
    base, words = tiny(), tokenizer()
    ids = prompt()
    text = words.convert_ids_to_tokens(base.generate(ids, max_new_tokens=20, do_sample=False)[0].tolist())
    settings = {"max_new_tokens": 20, "do_sample": False, "stop_strings": ["".join(text[18:20])], "tokenizer": words}
    expected = base.generate(ids, **settings)
    model = compose(base, Oracle(base.generate(ids, max_new_tokens=30, do_sample=False)[0].tolist()), budget=32)
    assert torch.equal(model.generate(ids, **settings), expected)
    assert expected.shape[1] < 32
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(ids, max_new_tokens=5, stop_strings=["b"])


def test_it_saves_as_the_base_does(tmp_path):
    model = compose(tiny(), prompt_tokens(), budget=8)
    model.save_pretrained(tmp_path)
    again = type(tiny()).from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(again(prompt()).logits, model(prompt()).logits)


REFUSALS = [
    ({"num_beams": 3}, "beam search"),
    ({"assistant_model": "base"}, "compose"),
    ({"prompt_lookup_num_tokens": 3}, "compose"),
    ({"use_cache": False}, "use_cache"),
    ({"cache_implementation": "static"}, "StaticLayer"),
    ({"num_return_sequences": 2, "do_sample": True}, "one sequence per call"),
    ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    ({"synced_gpus": True}, "synced_gpus"),
    ({"custom_generate": "someone/something"}, "custom_generate"),
    ({"inputs_embeds": torch.zeros(1, 3, 32)}, "inputs_embeds"),
    ({"position_ids": 1 + torch.arange(12)[None]}, "attention_mask"),
    ({"token_healing": True}, "heal_tokens"),
    ({"top_kk": 3}, "top_kk"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSALS, ids=lambda value: str(value)[:30])
def test_refused_before_any_forward(settings, message, monkeypatch):
    base = tiny()
    model = compose(base, prompt_tokens(), budget=8)
    monkeypatch.setattr(type(base), "forward", lambda *a, **k: pytest.fail("a forward ran"))
    settings = {name: base if value == "base" else value for name, value in settings.items()}
    with pytest.raises(ValueError, match=message):
        model.generate(prompt(), max_new_tokens=5, **settings)


def test_batches_empty_prompts_and_prompts_too_long_are_refused():
    model = compose(tiny(), prompt_tokens(), budget=8)
    with pytest.raises(ValueError, match="one sequence per call"):
        model.generate(torch.cat([prompt(), prompt()]), max_new_tokens=5)
    with pytest.raises(ValueError, match="empty"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=5)
    with pytest.raises(ValueError, match="161 tokens, LlamaForCausalLM takes 160"):
        model.generate(prompt(161), max_new_tokens=5)
    padded = torch.tensor([[1] * 10 + [0] * 2])
    with pytest.raises(ValueError, match="ends in padding"):
        model.generate(prompt(), attention_mask=padded, max_new_tokens=5)
    cached = model.generate(prompt(), max_new_tokens=5, return_dict_in_generate=True, do_sample=False)
    with pytest.raises(ValueError, match=f"{GENERATE_NAME} holds 16 tokens"):
        model.generate(cached.sequences[:, :10], **continuing(cached), max_new_tokens=5)


def test_bases_that_cannot_verify_a_tree_are_refused(monkeypatch):
    small = {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    with pytest.raises(ValueError, match="takes no position_ids"):
        compose(BloomForCausalLM(BloomConfig(**small)))
    t5 = T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    with pytest.raises(ValueError, match="encoder-decoder"):
        compose(T5ForConditionalGeneration(t5))
    mamba = MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(ValueError, match="position_ids, which say where"):
        compose(mamba)
    with pytest.raises(TypeError, match="transformers model"):
        compose(torch.nn.Linear(2, 2))
    chunked, embedded = tiny(), tiny()
    chunked.config.layer_types = ["chunked_attention", "full_attention", "chunked_attention"]
    with pytest.raises(ValueError, match="attends within chunks"):
        compose(chunked)
    embedded.config.hidden_size_per_layer_input = 8
    with pytest.raises(ValueError, match="once more for each layer"):
        compose(embedded)
    with pytest.raises(ValueError, match="a composition already: compose its own base"):
        compose(compose(tiny(), budget=4), "lookup")
    neo = GPTNeoConfig(
        vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64, window_size=16, attn_implementation="eager",
    )  # fmt: skip
    with pytest.raises(ValueError, match="by their place in a forward"):
        compose(GPTNeoForCausalLM(neo))
    split = tiny()
    split._tp_size = 2
    with pytest.raises(ValueError, match="split over processes"):
        compose(split)
    with monkeypatch.context() as patch:
        patch.setattr(refuse, "is_fsdp_managed_module", lambda _: True)
        with pytest.raises(ValueError, match="without tp_plan, FSDP or ZeRO-3"):
            compose(tiny())
    with pytest.raises(ValueError, match="not in memory"):
        compose(cpu_offload(tiny(), execution_device="cpu"))
    for name in ("_sample", "generate"):
        with monkeypatch.context() as patch:
            patch.setattr(LlamaForCausalLM, name, lambda self, pixels, **kwargs: None)
            with pytest.raises(ValueError, match="by a loop or by arguments of its own"):
                compose(tiny())
    flash = tiny()
    flash.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match='attn_implementation="sdpa"'):
        compose(flash)


def test_unknown_keywords_and_impossible_budgets():
    with pytest.raises(TypeError, match="budgett"):
        compose(tiny(), budgett=3)
    with pytest.raises(ValueError, match="at least one row"):
        compose(tiny(), budget=0)


def test_the_budget_is_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("PPD_COMPOSE_HOME", str(tmp_path))
    base = tiny()
    model = compose(base, prompt_tokens())
    model.generate(prompt(), max_new_tokens=3, do_sample=False)
    monkeypatch.setattr(Budget, "measure", lambda *a: pytest.fail("measured twice"))
    again = compose(base, prompt_tokens())
    again.generate(prompt(), max_new_tokens=3, do_sample=False)
    assert again.budget == model.budget


@pytest.mark.parametrize("fault", ["unwritable", "damaged"])
def test_a_cache_that_cannot_keep_the_budget_does_not_keep_from_decoding(tmp_path, monkeypatch, fault):
    monkeypatch.setenv("PPD_COMPOSE_HOME", str(tmp_path))
    base = tiny()
    expected = base.generate(prompt(), max_new_tokens=3, do_sample=False)
    if fault == "unwritable":
        monkeypatch.setattr(Budget, "save", lambda *_: (_ for _ in ()).throw(PermissionError("read-only")))
    else:
        compose(base, prompt_tokens()).generate(prompt(), max_new_tokens=3, do_sample=False)
        (file,) = (tmp_path / "budgets").iterdir()
        file.write_text("{oops")
    model = compose(base, prompt_tokens())
    assert torch.equal(model.generate(prompt(), max_new_tokens=3, do_sample=False), expected)
    assert model.budget is not None


def test_a_drafter_that_cannot_be_a_key_is_refused():
    @dataclass
    class Equal:
        name: str = "equal"

        @hookimpl
        def propose(self, step):
            return None

    with pytest.raises(TypeError, match=r"'equal' cannot be a key of step.memory.*eq=False"):
        compose(tiny(), Equal())


def test_prompt_tokens_for_another_base_name_both():
    with pytest.raises(ValueError, match=r"hidden size 16.*hidden 32"):
        compose(tiny(), PromptTokens(torch.zeros(1, 1, 16)))


def test_attention_is_that_of_the_text_layers_where_others_compute_otherwise():
    text = {**FAMILIES["gemma3"][1], "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 8, "patch_size": 4}, mm_tokens_per_image=4,
        image_token_index=60, boi_token_index=59, eoi_token_index=58, attn_implementation={"text_config": "eager"},
    )  # fmt: skip
    torch.manual_seed(0)
    base = Gemma3ForConditionalGeneration(config).eval().double()
    base.generation_config = GenerationConfig(pad_token_id=0)
    assert (base.config._attn_implementation, base.config.text_config._attn_implementation) == ("sdpa", "eager")
    ids = prompt(20).clamp(max=50)
    expected = base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    model = compose(base, Oracle(expected[0].tolist()), budget=12)
    assert torch.equal(
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False), expected
    )
    config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match='attn_implementation="sdpa"'):
        compose(base)


def test_time_is_what_decoding_takes_and_not_what_measuring_took(monkeypatch):
    def measured(model):
        time.sleep(3.5)
        return Budget.flat(8)

    monkeypatch.setattr(generation, "measured_budget", measured)
    model = compose(tiny(), prompt_tokens())
    assert model.generate(prompt(), max_new_tokens=4, max_time=3, do_sample=False).shape[1] == 12 + 4


def test_a_default_device_elsewhere_is_not_where_the_host_works():
    base = tiny()
    with torch.device("meta"):
        assert measured_budget(base).max_rows == 64


def test_attention_that_is_changed_after_composing_is_refused():
    base = tiny()
    model = compose(base, prompt_tokens(), budget=8)
    base.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match='attn_implementation="sdpa"'):
        model.generate(prompt(), max_new_tokens=5)


def test_token_healing_of_the_models_own_config_is_refused():
    model = compose(tiny(), prompt_tokens(), budget=8)
    model.generation_config.token_healing = True
    with pytest.raises(ValueError, match="heal_tokens"):
        model.generate(prompt(), max_new_tokens=5)


def test_prompt_tuning_around_a_composition_is_refused():
    model = compose(tiny(dtype=torch.float32), prompt_tokens(), budget=8)
    tuned = get_peft_model(model, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="prompt and prefix tuning"):
        tuned.generate(input_ids=prompt(), max_new_tokens=5)


def test_lora_around_a_composition_decodes():
    base = tiny(dtype=torch.float32)
    model = compose(base, prompt_tokens(), budget=8)
    tuned = get_peft_model(model, LoraConfig(init_lora_weights=False, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    settings = {"input_ids": prompt(), "max_new_tokens": 20, "do_sample": False}
    assert torch.equal(tuned.generate(**settings), base.generate(**settings))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_copy_would_part_it_from_its_base(copied):
    model = compose(tiny(), prompt_tokens(), budget=8)
    with pytest.raises(TypeError, match="neither copied nor pickled: copy or save the base"):
        copied(model)


def negated(module, given, out):
    out.logits = -out.logits
    return out


def test_what_is_hooked_into_the_base_itself_means_the_composition_until_it_is_taken_off():
    base = tiny()
    early = base.register_forward_hook(negated)
    model, plainly = compose(base, prompt_tokens(), budget=8), tiny().generate(prompt(), max_new_tokens=12)
    turned = base.generate(prompt(), max_new_tokens=12)
    assert not torch.equal(turned, plainly)
    assert torch.equal(model.generate(prompt(), max_new_tokens=12), turned)
    early.remove()
    assert torch.equal(model.generate(prompt(), max_new_tokens=12), plainly)
    usual = base.forward
    base.forward = lambda *args, **kwargs: negated(base, args, usual(*args, **kwargs))
    assert torch.equal(model.generate(prompt(), max_new_tokens=12), turned)
    del base.forward
    late = base.register_forward_hook(negated)
    assert torch.equal(model.generate(prompt(), max_new_tokens=12), turned)
    late.remove()
    assert torch.equal(model.generate(prompt(), max_new_tokens=12), plainly)
    assert not model._forward_hooks


def test_a_hook_of_the_composition_s_own_stays_while_those_of_the_base_come_and_go():
    base, calls = tiny(), []
    model = compose(base, prompt_tokens(), budget=8)
    model.register_forward_hook(lambda *_: calls.append(1))
    base.register_forward_hook(lambda *_: None).remove()
    model.generate(prompt(), max_new_tokens=4)
    assert calls


def test_a_packed_composition_says_that_a_hook_of_the_base_does_not_reach_it():
    base = tiny(dtype=torch.float32)
    model = compose(base, prompt_tokens(), budget=8, packed=True)
    hook = base.register_forward_hook(negated)
    with pytest.raises(ValueError, match="modules, parameters or hooks of the base are others since"):
        model.generate(prompt(), max_new_tokens=4)
    hook.remove()
    model.generate(prompt(), max_new_tokens=4)


def test_positions_that_a_tree_does_not_know_are_refused(monkeypatch):
    """As behind images, where a text goes on at other positions than its tokens count."""
    usual = LlamaForCausalLM._prepare_position_ids_for_generation
    image = 7 * (torch.arange(12) > 3)
    monkeypatch.setattr(
        LlamaForCausalLM, "_prepare_position_ids_for_generation", lambda *given: usual(*given)[None] + image
    )
    with pytest.raises(ValueError, match=r"places the last token at \[18\], behind 11 others"):
        compose(tiny(), prompt_tokens(), budget=8).generate(prompt(), max_new_tokens=5)


@pytest.mark.parametrize("given", [8.0, "8", {}, True])
def test_a_budget_that_is_none_is_refused_at_once(given):
    with pytest.raises(TypeError, match="budget is the most rows of a forward"):
        compose(tiny(), prompt_tokens(), budget=given)


def test_a_budget_may_be_a_number_of_numpy():
    model = compose(tiny(), prompt_tokens(), budget=np.int64(8))
    assert model.budget.max_rows == 8


def test_drafters_in_a_list_are_refused():
    with pytest.raises(TypeError, match=r"one by one, compose\(base, \*drafters\), got a list"):
        compose(tiny(), [prompt_tokens()])
