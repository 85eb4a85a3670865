"""Training: the loss and its mask, own replies, determinism, resuming, and a base that stays as it was."""

import json
import math
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, PartialState, cpu_offload
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from test_compose import tokenizer
from tiny import FAMILIES, prompt, tiny
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM

from ppd_compose import PromptTokens, compose, load_drafter, training_loop
from ppd_compose import replies as replies_module
from ppd_compose import train as train_module
from ppd_compose.checkpoints import discard, resume
from ppd_compose.distill import Batch, PromptRows, insertion_mask
from ppd_compose.identity import weights_digest
from ppd_compose.plugins import installed
from ppd_compose.prompts import Prompt, encode, read_prompts
from ppd_compose.replies import Reply, own_replies
from ppd_compose.train import PromptRecipe, first_rows, make_batch, train_prompt_tokens
from ppd_compose.train_job import train_ppd
from ppd_compose.training_setup import refuse_out, split_replies

RECIPE = PromptRecipe(num_prompt_tokens=2, ensemble=2, steps=6, batch_size=2, points=5, checkpoint_every=2, warmup=1)


def replies(base, count=6):
    made = []
    for seed in range(count):
        ids = prompt(6 + seed, seed)
        whole = base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=14, do_sample=False)
        made.append(Reply(ids[0].tolist(), whole[0, ids.shape[1] :].tolist()))
    return made


def trained(base, folder, recipe=RECIPE):
    mine = replies(base)
    return train_prompt_tokens(base, mine[:-1], mine[-1:], recipe, folder)


def test_training_needs_no_double_precision(tmp_path, no_double):
    assert trained(tiny(dtype=torch.float32), tmp_path).accuracy


def test_the_insertion_mask_is_that_of_the_ensemble():
    see = insertion_mask(torch.tensor([[1, 3]]), 5, 2, 2)[0]
    assert see.shape == (8, 13)
    assert see[:4, :5].tolist() == [[True, True, False, False, False]] * 4
    assert see[4:, :5].tolist() == [[True, True, True, True, False]] * 4
    # Rows of a group: token 0 embeddings 0 and 1, token 1 embeddings 0 and 1.
    own = [
        [True, False, False, False],
        [False, True, False, False],
        [True, False, True, False],
        [False, True, False, True],
    ]
    assert see[:4, 5:9].tolist() == own
    assert not see[:4, 9:].any()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_the_loss_is_the_divergence_from_the_models_own_distribution(family):
    """Batch, padding and block mask at once, against one forward for every insertion point."""
    base = tiny(family, attention="eager")
    ids = [torch.randint(2, 60, (length,), generator=torch.Generator().manual_seed(length)) for length in (9, 13)]
    points = torch.tensor([[3, 5], [7, -1]])
    batch = Batch(torch.nn.utils.rnn.pad_sequence(ids, batch_first=True), points)
    rows = PromptRows(torch.randn(2, 2, 32, generator=torch.Generator().manual_seed(0))).double()
    expected = torch.zeros(2, dtype=torch.float64)
    for sequence, point in ((0, 3), (0, 5), (1, 7)):
        known = base.get_input_embeddings()(ids[sequence][None, : point + 1])
        own = base(ids[sequence][None]).logits[0].log_softmax(-1)
        for i in range(2):
            each = [
                base(inputs_embeds=torch.cat([known, rows.embeddings[None, : i + 1, j]], 1)).logits[0, -1].softmax(-1)
                for j in range(2)
            ]
            guess, target = torch.stack(each).mean(0).log(), own[point + 1 + i]
            expected[i] += (target.exp() * (target - guess)).sum() / 3
    taught = rows(base, batch, 0.8)
    torch.testing.assert_close(
        taught.loss, ((expected * torch.tensor([1.0, 0.8])).sum() / 2).float(), rtol=1e-4, atol=1e-4
    )
    assert taught.truth.tolist() == [ids[s][p + 2 : p + 4].tolist() for s, p in ((0, 3), (0, 5), (1, 7))]


def test_the_base_is_frozen_meanwhile_and_as_it_was_after(tmp_path):
    base = tiny(dtype=torch.float32).train()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    result = trained(base, tmp_path)
    assert base.training
    assert all(p.requires_grad and p.grad is None for p in base.parameters())
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
    assert result.embeddings.shape == (2, 2, 32)
    assert len(result.accuracy) == 2
    assert all(0 <= share <= 1 for row in result.accuracy for share in row)


def test_modules_that_were_in_evaluation_mode_are_so_afterwards(tmp_path):
    base = tiny(dtype=torch.float32).train()
    base.model.layers[0].eval()
    before = [module.training for module in base.modules()]
    trained(base, tmp_path)
    assert [module.training for module in base.modules()] == before


def test_same_seed_same_rows_and_another_seed_others(tmp_path):
    base = tiny(dtype=torch.float32)
    one, two = trained(base, tmp_path / "a"), trained(base, tmp_path / "b")
    other = trained(base, tmp_path / "c", PromptRecipe(**{**vars(RECIPE), "seed": 1}))
    assert torch.equal(one.embeddings, two.embeddings)
    assert not torch.equal(one.embeddings, other.embeddings)


@pytest.mark.parametrize("killed_at", [1, 3, 4, 6])
def test_killed_at_any_step_it_resumes_to_the_same_rows(tmp_path, monkeypatch, killed_at):
    base = tiny(dtype=torch.float32)
    whole = trained(base, tmp_path / "whole")
    draw, count = train_module.make_batch, [0]

    def fails(*args):
        count[0] += 1
        if count[0] == killed_at:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(train_module, "make_batch", fails)
    with pytest.raises(KeyboardInterrupt):
        trained(base, tmp_path / "cut")
    assert all(p.requires_grad for p in base.parameters())
    assert not list((tmp_path / "cut").glob(".*"))
    count[0] = 99
    again = trained(base, tmp_path / "cut")
    assert torch.equal(again.embeddings, whole.embeddings)


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    base = tiny(dtype=torch.float32)
    trained(base, tmp_path)
    with pytest.raises(ValueError, match="another recipe"):
        trained(base, tmp_path, PromptRecipe(**{**vars(RECIPE), "learning_rate": 1.0}))


@pytest.mark.parametrize("other", ["base", "prompts", "start"])
def test_a_checkpoint_of_another_beginning_is_refused(tmp_path, other):
    base = tiny(dtype=torch.float32)
    trained(base, tmp_path)
    mine, start = replies(tiny(dtype=torch.float32, seed=1) if other == "base" else base), None
    if other == "prompts":
        mine = mine[1:]
    if other == "start":
        start = PromptRows(torch.zeros(2, 2, 32))
    with pytest.raises(ValueError, match="another base, other prompts, another start"):
        train_prompt_tokens(base, mine[:-1], mine[-1:], RECIPE, tmp_path, start)


def test_replies_of_a_fine_tune_are_not_those_of_its_base(tmp_path):
    base, tuned = tiny(), tiny()
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight.mul_(-1.5)
    ids = [prompt()[0].tolist()]
    mine, theirs = (own_replies(model, ids, tmp_path, max_new_tokens=12)[0] for model in (base, tuned))
    whole = tuned.generate(prompt(), attention_mask=torch.ones(1, 12), max_new_tokens=12, do_sample=False)
    assert theirs.ids == whole[0].tolist()
    assert theirs.reply != mine.reply


def test_without_a_held_out_reply_that_tells_accuracies_nothing_is_trained(tmp_path):
    base = tiny(dtype=torch.float32)
    with pytest.raises(ValueError, match="none of 1 replies can be used"):
        train_prompt_tokens(base, replies(base), [Reply([1, 2], [3])], RECIPE, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_training_lowers_the_loss(tmp_path):
    base = tiny(dtype=torch.float32)
    mine = replies(base)
    recipe = PromptRecipe(num_prompt_tokens=2, steps=60, points=8, learning_rate=3e-2, warmup=1)
    batch = make_batch(mine, recipe, 0)
    start = PromptRows(train_module.initial_embeddings(base, recipe))(base, batch, 0.8).loss
    made = train_prompt_tokens(base, mine, mine[:1], recipe, tmp_path)
    assert PromptRows(made.embeddings)(base, batch, 0.8).loss < 0.95 * start


@pytest.mark.parametrize("name", ["num_prompt_tokens", "ensemble", "steps", "points"])
def test_a_recipe_of_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        PromptRecipe(**{name: 0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefix": 257}, "prefix must be at most 256, got 257"),
        ({"num_prompt_tokens": 257}, "num_prompt_tokens is more than 256"),
        ({"ensemble": 257}, "ensemble is more than 256"),
        ({"ensemble": 2.0}, r"ensemble must be a whole number of at least 1, got 2\.0"),
        ({"seed": -1}, "seed must be a whole number from 0 to 4294967295, got -1"),
        ({"seed": 2**32}, "seed must be a whole number from 0 to 4294967295, got 4294967296"),
        ({"seed": 0.5}, r"seed must be a whole number .* got 0\.5"),
        ({"learning_rate": 0.0}, r"learning_rate must be a finite number above 0, got 0\.0"),
        ({"learning_rate": -1e-2}, "learning_rate must be a finite number above 0, got -0.01"),
        ({"learning_rate": math.nan}, "learning_rate must be a finite number above 0, got nan"),
        ({"decay": 0.0}, r"decay must be a finite number above 0, got 0\.0"),
        ({"decay": math.inf}, "decay must be a finite number above 0, got inf"),
    ],
)
def test_a_recipe_that_no_training_can_follow_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PromptRecipe(**settings)


def test_a_recipe_at_its_limits_is_followed(tmp_path):
    limits = {"prefix": 256, "num_prompt_tokens": 256, "ensemble": 256, "seed": 2**32 - 1}
    assert PromptRecipe(**limits).prefix == 256
    trained(tiny(dtype=torch.float32), tmp_path, replace(RECIPE, seed=2**32 - 1, steps=1))


def test_replies_too_short_to_learn_from(tmp_path):
    with pytest.raises(ValueError, match="none of 1 replies"):
        train_prompt_tokens(tiny(), [Reply([1, 2], [3])], [], RECIPE, tmp_path)


def test_own_replies_are_those_of_generate_and_are_made_once(tmp_path, monkeypatch):
    base = tiny(eos=9)
    asked = [prompt(5 + i % 4, i)[0].tolist() for i in range(7)]
    made = own_replies(base, asked, tmp_path, max_new_tokens=12, batch_size=3)
    for ids, reply in zip(asked, made, strict=True):
        whole = torch.tensor([ids])
        expected = base.generate(whole, attention_mask=torch.ones_like(whole), max_new_tokens=12, do_sample=False)
        assert reply.ids == expected[0].tolist()
    generate, calls = replies_module._generate, []
    monkeypatch.setattr(replies_module, "_generate", lambda *a: calls.append(1) or generate(*a))
    assert own_replies(base, asked, tmp_path, max_new_tokens=12, batch_size=3) == made
    assert not calls
    next(tmp_path.glob("*/*.json")).unlink()
    assert own_replies(base, asked, tmp_path, max_new_tokens=12, batch_size=3) == made
    assert len(calls) == 1
    assert own_replies(tiny(seed=1, eos=9), asked, tmp_path, max_new_tokens=12, batch_size=3) != made


def test_replies_that_were_being_written_or_cannot_be_read_are_made_again(tmp_path):
    base, asked = tiny(), [prompt(5 + i, i)[0].tolist() for i in range(4)]
    made = own_replies(base, asked, tmp_path, max_new_tokens=12, batch_size=2)
    first, second = sorted(tmp_path.glob("*/*.json"))
    first.write_text(first.read_text()[:-9])
    second.rename(second.with_name(f".{second.name}.0123.json")).write_text("")  # as a kill leaves it
    assert own_replies(base, asked, tmp_path, max_new_tokens=12, batch_size=2) == made


def test_replies_of_other_settings_are_not_those_without(tmp_path):
    base, other, asked = tiny(), tiny(), [prompt()[0].tolist()]
    other.generation_config.repetition_penalty = 5.0
    mine, theirs = (own_replies(model, asked, tmp_path, max_new_tokens=12)[0] for model in (base, other))
    whole = other.generate(prompt(), attention_mask=torch.ones(1, 12), max_new_tokens=12, do_sample=False)
    assert theirs.ids == whole[0].tolist() != mine.ids
    other.generation_config.repetition_penalty, other.generation_config.temperature = None, 0.3
    assert own_replies(other, asked, tmp_path, max_new_tokens=12)[0] == mine  # which no greedy generation heeds
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}}),
        ("mistral", {"sliding_window": 2}),
        ("granite", {"logits_scaling": 1e-3, "embedding_multiplier": 0.1}),
    ],
)
def test_replies_of_the_same_weights_with_another_configuration_are_others(tmp_path, family, settings):
    base, other, asked = tiny(family), tiny(family, **settings), [prompt()[0].tolist()]
    assert weights_digest(base) == weights_digest(other)
    mine, theirs = (own_replies(model, asked, tmp_path, max_new_tokens=12)[0] for model in (base, other))
    whole = other.generate(prompt(), attention_mask=torch.ones(1, 12), max_new_tokens=12, do_sample=False)
    assert theirs.ids == whole[0].tolist() != mine.ids


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_that_was_saved_has_the_same_replies_wherever_it_lies(tmp_path, family):
    base, asked = tiny(family, attention="eager"), [prompt()[0].tolist()]
    made = own_replies(base, asked, tmp_path / "replies", max_new_tokens=4)
    base.save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=base.dtype)
    again.config.use_cache = False
    again.config.pad_token_id = 3
    assert own_replies(again, asked, tmp_path / "replies", max_new_tokens=4) == made
    assert len(list((tmp_path / "replies").iterdir())) == 1


def test_replies_of_one_adapter_are_not_those_of_another(tmp_path):
    lora, told = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False), []
    tuned = PeftModel(tiny(), lora, "a")
    tuned.add_adapter("b", lora)
    base = tuned.get_base_model()
    for name in "ab":
        tuned.set_adapter(name)
        told.append(own_replies(base, [prompt()[0].tolist()], tmp_path, max_new_tokens=12)[0].ids)
        whole = base.generate(prompt(), attention_mask=torch.ones(1, 12), max_new_tokens=12, do_sample=False)
        assert told[-1] == whole[0].tolist()
    assert told[0] != told[1]


def test_a_prompt_that_is_given_twice_counts_once():
    asked = [Prompt((text,)) for text in ("abc", "de", "abc", "fgh", "de")]
    learnt, held = split_replies(tiny(), tokenizer(), asked, 1, 4, 4)
    assert [len(learnt), len(held)] == [2, 1]
    assert len({tuple(reply.prompt) for reply in [*learnt, *held]}) == 3


def test_training_happens_where_the_base_is(tmp_path, monkeypatch):
    """Not on the device that accelerate would take, here one that cannot compute."""
    base = tiny(dtype=torch.float32)
    mine = replies(base)
    expected = train_prompt_tokens(base, mine[:-1], mine[-1:], RECIPE, tmp_path / "here").embeddings
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(PartialState, "default_device", torch.device("meta"))
    made = train_prompt_tokens(base, mine[:-1], mine[-1:], RECIPE, tmp_path / "there").embeddings
    AcceleratorState._reset_state(reset_partial_state=True)
    assert base.device.type == "cpu"
    assert torch.equal(made, expected)


def test_the_rate_falls_to_zero_at_the_last_step_of_several_processes_too(tmp_path, monkeypatch):
    base, rates = tiny(dtype=torch.float32), []
    mine = replies(base)
    PartialState()._shared_state["num_processes"] = 2  # as far as schedules can tell
    tell = training_loop._tell
    monkeypatch.setattr(
        training_loop, "_tell", lambda *told: rates.append(schedules[0].get_last_lr()[0]) or tell(*told)
    )
    schedules, make = [], training_loop.get_cosine_schedule_with_warmup
    monkeypatch.setattr(
        training_loop, "get_cosine_schedule_with_warmup", lambda *given: schedules.append(make(*given)) or schedules[-1]
    )
    train_prompt_tokens(base, mine[:-1], mine[-1:], RECIPE, tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0)
    assert rates[-2] > 0


def test_replies_that_reach_too_far_are_told(tmp_path):
    base = tiny(dtype=torch.float32)
    short, far = replies(base, 1), [Reply(prompt(140, seed)[0].tolist(), [5] * 14) for seed in range(3)]
    recipe = replace(RECIPE, max_length=64)
    with pytest.warns(UserWarning, match=r"only 1 of 4 replies can be used: .* first 64 of prompt and reply"):
        train_prompt_tokens(base, [*short, *far], short, recipe, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompts"),
        ('{"prompt": "a"}\n{"prompt": \n', "line 2: not JSON"),
        ('{"prompt": "a"}\n\n{"promt": "b"}\n', 'line 3: needs "prompt"'),
        ('{"turns": []}', "line 1: needs"),
        ('{"turns": ["a", 3]}', "line 1: needs"),
        ("[1, 2]", "line 1: needs"),
        ('{"prompt": "  "}', "line 1: needs"),
        ('{"prompt": "a"}\n{"prompt": "cut \\ud83d"}', r"prompts\.jsonl, line 2: .* half of a character"),
        ('{"turns": ["a", "\\udc00 b"]}', "line 1: .* half of a character"),
        ('{"prompt": "a", "category": "\\ud83d"}', "line 1: .* half of a character"),
        ('{"prompt": "a", "id": ' + "7" * 5000 + "}", r"prompts\.jsonl, line 1: not JSON"),
        ('{"prompt": "a"}\n' + "[" * 100_000 + "]" * 100_000, r"prompts\.jsonl, line 2: not JSON"),
    ],
)
def test_a_malformed_prompt_file_names_the_line(tmp_path, text, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


def test_prompts_of_both_forms(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\r\n' + json.dumps({"turns": ["b", "c"], "category": "qa", "question_id": 7}))
    assert read_prompts(path) == [Prompt(("a",)), Prompt(("b", "c"), "qa")]


def test_prompts_of_other_encodings(tmp_path):
    (tmp_path / "marked.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n')
    assert read_prompts(tmp_path / "marked.jsonl") == [Prompt(("a",))]
    (tmp_path / "wide.jsonl").write_text('{"prompt": "a"}', encoding="utf-16")
    with pytest.raises(ValueError, match=r"wide\.jsonl is not UTF-8"):
        read_prompts(tmp_path / "wide.jsonl")


def test_line_breaks_of_other_kinds_may_stand_in_a_prompt(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a\u2028b\u0085c"}\n{"prompt": "d"}\n', encoding="utf-8")
    assert read_prompts(path) == [Prompt(("a\u2028b\u0085c",)), Prompt(("d",))]


def test_encode_uses_the_chat_template_where_there_is_one():
    class Words:
        chat_template = None

        def __call__(self, text, **kwargs):
            return {"input_ids": [len(word) for word in text.split()]}

        def apply_chat_template(self, turns, **kwargs):
            return f"user {turns[0]['content']} assistant"

    words = Words()
    assert encode(words, "hi there") == [2, 5]
    words.chat_template = "yes"
    assert encode(words, "hi there") == [4, 2, 5, 9]


def test_what_was_trained_can_be_composed(tmp_path):
    from ppd_compose import PromptTokens

    base = tiny(dtype=torch.float32)
    made = trained(base, tmp_path)
    shutil.rmtree(tmp_path)
    model = compose(base, PromptTokens(made.embeddings, made.accuracy), budget=16)
    expected = base.generate(prompt(), max_new_tokens=10, do_sample=False)
    assert torch.equal(model.generate(prompt(), max_new_tokens=10, do_sample=False), expected)


def test_the_loss_runs_on_all_families():
    for family in FAMILIES:
        base = tiny(family, dtype=torch.float32, attention="eager")
        recipe = PromptRecipe(**{**vars(RECIPE), "max_length": 14})  # within the window of 16
        batch = make_batch(replies(base, 2), recipe, 0)
        rows = PromptRows(train_module.initial_embeddings(base, recipe))
        rows(base, batch, 0.8).loss.backward()
        assert torch.isfinite(rows.embeddings.grad).all(), family


def test_training_goes_on_from_given_rows(tmp_path):
    base = tiny(dtype=torch.float32)
    mine = replies(base)
    first = trained(base, tmp_path / "first")
    still = PromptRecipe(**{**vars(RECIPE), "learning_rate": 1e-12})
    start = first_rows(base, still, first.embeddings)
    again = train_prompt_tokens(base, mine[:-1], mine[-1:], still, tmp_path / "again", start)
    torch.testing.assert_close(again.embeddings, first.embeddings)
    other = PromptRecipe(**{**vars(RECIPE), "num_prompt_tokens": 3})
    with pytest.raises(ValueError, match=r"start from \(2, 2\) embeddings, the recipe wants \(3, 2\)"):
        first_rows(base, other, first.embeddings)


def test_weights_that_are_kept_as_whole_numbers_tell_models_apart():
    base, other = tiny(), tiny()
    assert weights_digest(base) == weights_digest(other)
    for model, entries in ((base, [1, 2]), (other, [1, 3])):
        model.model.layers[0].register_buffer("qweight", torch.tensor(entries, dtype=torch.int32))
    assert weights_digest(base) != weights_digest(other)


def test_a_model_is_not_written_over_and_what_else_is_there_stays(tmp_path):
    base = tiny(dtype=torch.float32, eos=60)
    base.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"holds a model \(llama\), which would be written over"):
        train_ppd(base, tokenizer(), [Prompt(("ab",))], tmp_path, RECIPE)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file: give the folder to write"):
        refuse_out(tmp_path / "file", PromptTokens)


@pytest.mark.parametrize("place", ["file/x", "file/x/y", "link", "/proc/x"])
def test_a_place_that_cannot_be_written_is_told_before_replies_are_made(tmp_path, monkeypatch, place):
    if place.startswith("/") and not os.path.isdir(os.path.dirname(place)):
        pytest.skip("no such folder here")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("ppd_compose.training_setup.own_replies", lambda *a, **k: pytest.fail("replies were made"))
    base = tiny(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"cannot be written \(.+\): give another folder"):
        train_ppd(base, tokenizer(), [Prompt(("ab",))], tmp_path / place, RECIPE, reply_tokens=12)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_place_that_can_be_written_is_left_as_it_was_until_something_is(tmp_path):
    for out in (tmp_path, tmp_path / "a" / "b"):
        refuse_out(out, PromptTokens)
    assert not list(tmp_path.iterdir())


def test_checkpoints_that_a_kill_cut_off_go_with_the_others(tmp_path):
    base, asked = tiny(dtype=torch.float32, eos=60), [Prompt((f"{c}abcdefg",)) for c in "hijkl"]
    cut = [tmp_path / name / ".step-000002.0123" for name in ("run", "whole/.checkpoints")]
    for each in cut:
        each.mkdir(parents=True)
        (each / "model.safetensors").touch()
    trained(base, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step-000004", "step-000006"]
    train_ppd(base, tokenizer(), asked, tmp_path / "whole", replace(RECIPE, steps=1), held_out=1, reply_tokens=12)
    assert not (tmp_path / "whole" / ".checkpoints").exists()


def test_what_a_kill_left_of_checkpoints_is_removed_when_they_have_served(tmp_path):
    (tmp_path / ".checkpoints" / ".step-000002.0123").mkdir(parents=True)
    (tmp_path / ".checkpoints" / "step-000004").mkdir()
    discard(tmp_path / ".checkpoints")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_finds_no_room_is_told_by_its_place(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(Accelerator, "save_state", full)
    with pytest.raises(OSError, match=r"step-\d+ cannot be written \(No space left on device\): make room"):
        trained(tiny(dtype=torch.float32), tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_checkpoints_are_hidden_and_folders_of_others_stay(tmp_path):
    base, asked = tiny(dtype=torch.float32, eos=60), [Prompt((f"{c}abcdefg",)) for c in "hijkl"]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-1").mkdir()
    train_ppd(base, tokenizer(), asked, tmp_path, RECIPE, held_out=1, reply_tokens=12)
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "checkpoints"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / "checkpoints" / "step-1").is_dir()


def test_a_training_that_diverges_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"diverged at a learning rate of 1e\+39"):
        trained(tiny(dtype=torch.float32), tmp_path, replace(RECIPE, learning_rate=1e39))
    assert not list(tmp_path.glob("step-*"))


def test_another_number_of_processes_does_not_go_on(tmp_path):
    trained(tiny(dtype=torch.float32), tmp_path)
    for path in tmp_path.glob("step-*/recipe.json"):
        told = json.loads(path.read_text())
        path.write_text(json.dumps({**told, "processes": 2}))
    with pytest.raises(ValueError, match="number of processes"):
        trained(tiny(dtype=torch.float32), tmp_path)


def test_the_newest_checkpoint_is_that_of_the_most_steps(tmp_path):
    for step in (999_900, 1_000_000):
        (tmp_path / f"step-{step:06}").mkdir()
        (tmp_path / f"step-{step:06}" / "recipe.json").write_text("{}")
    loaded = []
    assert resume(SimpleNamespace(load_state=loaded.append), tmp_path, {}) == 1_000_000
    assert loaded == [str(tmp_path / "step-1000000")]


def test_prompts_without_room_for_a_reply_are_left_out():
    base = tiny("gpt2", eos=60, dtype=torch.float32)  # 160 positions, and an embedding for each
    asked = [Prompt((text,)) for text in ("ab", "cd", "e" * 150)]
    with pytest.warns(UserWarning, match="with replies of 20 tokens 1 of 3 prompts exceed the 160 positions"):
        learnt, held = split_replies(base, tokenizer(), asked, 1, 20, 4)
    assert len(learnt) + len(held) == 2
    with pytest.raises(ValueError, match="3 of 3 prompts exceed"):
        split_replies(base, tokenizer(), asked, 1, 200, 4)


def test_a_base_on_several_devices_is_not_trained_on(tmp_path):
    base = tiny(dtype=torch.float32)
    base.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(ValueError, match=r"spread over .*training needs it on one device"):
        trained(base, tmp_path)


def test_batches_are_made_on_the_host_whatever_the_default_device():
    mine = [Reply([1, 2, 3], list(range(4, 20)))]
    expected = make_batch(training_loop.replies_of_batch(mine, RECIPE, 3), RECIPE, 3)
    with torch.device("meta"):
        batch = make_batch(training_loop.replies_of_batch(mine, RECIPE, 3), RECIPE, 3)
    assert torch.equal(batch.points, expected.points)


@pytest.mark.parametrize("changed", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"])
def test_a_single_entry_that_was_edited_makes_another_model(changed):
    base, other = tiny(vocab_size=2000), tiny(vocab_size=2000)
    assert weights_digest(base) == weights_digest(other)
    with torch.no_grad():
        other.get_parameter(changed).view(-1)[17] += 50
    assert weights_digest(base) != weights_digest(other)


def test_rows_that_changed_places_make_another_model():
    base, other = tiny(), tiny()
    with torch.no_grad():
        other.lm_head.weight[[3, 7]] = other.lm_head.weight[[7, 3]]
    assert weights_digest(base) != weights_digest(other)


def test_weights_of_a_class_of_their_own_tell_models_apart():
    bases = [tiny(), tiny()]
    for number, base in enumerate(bases):
        halves = [torch.full((4, 4), float(number)), torch.ones(4, 4)]
        base.model.layers[0].mlp.up_proj.weight = nn.Parameter(TwoTensor(*halves))
    assert weights_digest(bases[0]) != weights_digest(bases[1])


def test_a_base_that_is_set_to_return_more_than_tokens_replies_all_the_same(tmp_path):
    base = tiny()
    expected = own_replies(base, [[3, 4, 5]], tmp_path / "one", max_new_tokens=8)
    base.generation_config.return_dict_in_generate = True
    assert own_replies(base, [[3, 4, 5]], tmp_path / "other", max_new_tokens=8) == expected


def test_weights_that_are_not_in_memory_tell_no_base_apart():
    base = cpu_offload(tiny(), execution_device="cpu")
    with pytest.raises(ValueError, match=r"not in memory"):
        weights_digest(base)


def test_replies_of_a_base_in_training_mode_are_those_without_dropout(tmp_path):
    base = tiny("gpt2", dtype=torch.float32)  # has dropout
    expected = own_replies(base, [[3, 4, 5]], tmp_path / "one", max_new_tokens=30)
    base.train()
    assert own_replies(base, [[3, 4, 5]], tmp_path / "other", max_new_tokens=30) == expected
    assert base.training


@pytest.mark.parametrize("kind", ["LORA", "PROMPT_TUNING", None])
def test_adapters_of_other_kinds_are_not_written_over(tmp_path, kind):
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": kind} if kind else {"num_virtual_tokens": 3}))
    with pytest.raises(ValueError, match=rf"holds an adapter of another kind \({kind or 'no peft_type'}\)"):
        refuse_out(tmp_path, PromptTokens)
    config.write_text(json.dumps({"peft_type": "PPD"}))
    refuse_out(tmp_path, PromptTokens)


@pytest.mark.parametrize("name", ["ppd", "medusa", "eagle", "ngram"])
def test_a_drafter_is_not_written_over_by_one_of_another_kind(tmp_path, name):
    load_drafter(name).save_pretrained(tmp_path)
    config = "adapter_config.json" if name == "ppd" else "config.json"
    for other, kind in installed().items():
        if other == name:
            refuse_out(tmp_path, kind)
        elif hasattr(kind, "recognises"):
            with pytest.raises(ValueError, match=f"another kind of drafter, by its {config}, which would be"):
                refuse_out(tmp_path, kind)
