"""Training of EAGLE heads: the loss, what is drafted after it, determinism, resuming, the command, the base."""

import json
from dataclasses import replace

import pytest
import torch
from ppd_compose.integrations.eagle import EagleHead
from ppd_compose.integrations.eagle import train as train_module
from ppd_compose.integrations.eagle.borrowed import borrow
from ppd_compose.integrations.eagle.command import command
from ppd_compose.integrations.eagle.files import read_head
from ppd_compose.integrations.eagle.initial import VARIANTS, EagleRecipe, config_for, draft_vocabulary, initial_head
from ppd_compose.integrations.eagle.network import DraftNetwork
from ppd_compose.integrations.eagle.train import Course, evaluate, train_eagle, train_head
from test_eagle import random_head
from tiny import FAMILIES, VOCAB, prompt, tiny
from transformers import LlamaConfig, LlamaForCausalLM

from ppd_compose import Budget, Step, TokenTree, compose
from ppd_compose.prompts import Prompt
from ppd_compose.replies import Reply
from ppd_compose.training_loop import dice_of

RECIPE = EagleRecipe(steps=6, batch_size=2, points=5, checkpoint_every=2, warmup=1, unrolled=3, vocabulary=40)


def replies(base, count=6, length=24):
    made = []
    for seed in range(count):
        ids = prompt(6 + seed, seed)
        whole = base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False)
        made.append(Reply(ids[0].tolist(), whole[0, ids.shape[1] :].tolist()))
    return made


def trained(base, folder, recipe=RECIPE, **settings):
    mine = replies(base)
    return train_head(base, mine[:-1], mine[-1:], recipe, folder, **settings)


def student_of(head, base, recipe):
    course = Course(head, base, recipe)
    network = DraftNetwork.of(head.config, {name: w.float().clone() for name, w in head.network.items()})
    return course, course.student(network)


def test_training_needs_no_double_precision(tmp_path, no_double):
    assert trained(tiny(dtype=torch.float32), tmp_path).accuracy


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_the_loss_is_that_of_drafting_step_by_step(family, variant):
    """Every point on its own, drafted by the rows that decode, against the base's own distribution."""
    base = tiny(family, dtype=torch.float32, attention="eager")
    recipe = replace(RECIPE, variant=variant, points=4)
    reply = replies(base, 1)[0]
    head = initial_head(base, [reply], recipe)
    noise = torch.Generator().manual_seed(0)
    head = replace(head, network={n: w + 0.1 * torch.randn(w.shape, generator=noise) for n, w in head.network.items()})
    course, student = student_of(head, base, recipe)
    lesson = course.lesson(reply, dice_of(recipe, 0))
    taught = student([lesson], 3, 0.8)

    drafter = EagleHead(head, depth=0, top_k=VOCAB, grow=1)
    ids = reply.ids
    with torch.no_grad():
        out = base(torch.tensor([ids]), output_hidden_states=True)
        rows = out.logits[0][:, head.target_ids].log_softmax(-1)
    losses, counts = torch.zeros(3), torch.zeros(3)
    for point in lesson.points.tolist():
        states = {layer: out.hidden_states[layer][0, : point + 1] for layer in drafter.hidden_layers(base)}
        step = Step(ids[: point + 1], VOCAB, Budget.flat(VOCAB), 100, hidden_states=states)
        with torch.no_grad():
            drafter.start(step, base)
            step.ids = ids[: point + 2]
            trees = [drafter.propose(step)]
            for ahead in (1, 2):
                path = ids[point + 2 : point + 2 + ahead]
                step.memory[drafter].tree = TokenTree.chain(step.ids[-1])  # as if nothing of the path were its own
                trees.append(drafter.extend(step, TokenTree.chain(step.ids[-1], path, [0.0] * ahead)))
        for depth, tree in enumerate(trees):
            at, claims = point + 1 + depth, tree.log_probs[depth + 1 :]
            if ids[at + 1] in head.target_ids:
                by_id = torch.from_numpy(claims[tree.tokens[depth + 1 :].argsort()])
                losses[depth] -= (rows[at].exp() * by_id).sum().float()
                counts[depth] += 1
    expected = (losses / counts.clamp(min=1) * 0.8 ** torch.arange(3)).sum() / 3
    torch.testing.assert_close(taught.loss.detach(), expected, rtol=1e-4, atol=1e-4)


def test_the_draft_vocabulary_is_what_the_replies_say_most():
    mine = [Reply([9, 9, 9], [5, 5, 7]), Reply([1], [7, 5, 30])]
    assert draft_vocabulary(mine, 3, VOCAB).tolist() == [5, 7, 30]
    assert draft_vocabulary(mine, 5, VOCAB).tolist() == [0, 1, 5, 7, 30]
    assert draft_vocabulary(mine, VOCAB, VOCAB) is None


def test_the_head_of_the_demonstrations_base_is_small():
    sizes = {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "rope_theta": 1e5,
    }  # fmt: skip
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(**sizes))
        config = config_for(base, EagleRecipe())
        head = DraftNetwork(config)
    assert 2 * sum(w.numel() for w in head.parameters()) + 8 * config.draft_vocab_size + 49152 < 12_000_000
    assert config.layers == (2, 15, 27)
    assert config.layer["rope_theta"] == 1e5


def test_the_base_is_frozen_meanwhile_and_as_it_was_after(tmp_path):
    base = tiny(dtype=torch.float32).train()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    head = trained(base, tmp_path)
    assert base.training
    assert all(p.requires_grad and p.grad is None for p in base.parameters())
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
    assert not any(torch.equal(w, start) for w, start in zip(
        head.network.values(), initial_head(base, replies(base)[:-1], RECIPE).network.values(), strict=True
    ))  # fmt: skip
    assert head.lm_head is head.embedding is None
    assert head.config.layers == (1, 1, 2)
    assert len(head.accuracy) == 3
    assert all(0 <= share <= 1 for share in head.accuracy)
    checkpoint = sum(path.stat().st_size for path in next(tmp_path.glob("step-*")).iterdir())
    assert checkpoint < 4 * sum(w.nbytes for w in head.network.values())  # the base is no part of it


def test_same_seed_same_weights_and_another_seed_others(tmp_path):
    base = tiny(dtype=torch.float32)
    one, two = trained(base, tmp_path / "a"), trained(base, tmp_path / "b")
    other = trained(base, tmp_path / "c", replace(RECIPE, seed=1))
    assert all(torch.equal(w, two.network[name]) for name, w in one.network.items())
    assert not torch.equal(one.network["fc.weight"], other.network["fc.weight"])


@pytest.mark.parametrize("killed_at", [1, 4, 6])
def test_killed_at_any_step_it_resumes_to_the_same_weights(tmp_path, monkeypatch, killed_at):
    base = tiny(dtype=torch.float32)
    whole = trained(base, tmp_path / "whole")
    draw, count = train_module.replies_of_batch, [0]

    def fails(*args):
        count[0] += 1
        if count[0] == killed_at:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(train_module, "replies_of_batch", fails)
    with pytest.raises(KeyboardInterrupt):
        trained(base, tmp_path / "cut")
    assert all(p.requires_grad for p in base.parameters())
    count[0] = 99
    again = trained(base, tmp_path / "cut")
    assert all(torch.equal(w, whole.network[name]) for name, w in again.network.items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_lowers_the_loss_and_its_guesses_are_accepted(tmp_path, variant):
    base = tiny(dtype=torch.float32)
    mine = replies(base, 4, 40)
    recipe = EagleRecipe(
        steps=200, points=40, learning_rate=1e-2, warmup=5, unrolled=3, vocabulary=VOCAB, variant=variant,
        checkpoint_every=500,
    )  # fmt: skip
    start = initial_head(base, mine, recipe)
    course, student = student_of(start, base, recipe)
    lessons = [course.lesson(reply, dice_of(recipe, 0)) for reply in mine]
    before = float(student(lessons, 3, 0.8).loss.detach())
    head = train_head(base, mine, mine, recipe, tmp_path)
    course, student = student_of(head, base, recipe)
    assert float(student(lessons, 3, 0.8).loss.detach()) < 0.6 * before
    assert head.accuracy == tuple(evaluate(student, course, mine))
    assert min(head.accuracy) > 0.5
    model = compose(base, EagleHead(head, depth=3), budget=24)
    ids = torch.tensor([mine[0].prompt])
    out = model.generate(ids, max_new_tokens=40, do_sample=False)
    assert out[0].tolist() == mine[0].ids
    assert model.stats.forwards < 30
    assert set(model.stats.accepted["eagle"]) >= {1, 2, 3}


def test_half_precision_trains_in_float32_and_saves_its_own(tmp_path):
    base = tiny(dtype=torch.bfloat16)
    head = trained(base, tmp_path)
    assert {w.dtype for w in head.network.values()} == {torch.bfloat16}


def test_training_goes_on_from_a_head(tmp_path):
    base = tiny(dtype=torch.float32)
    first = trained(base, tmp_path / "a")
    more = trained(base, tmp_path / "b", start=first)
    assert torch.equal(more.target_ids, first.target_ids)
    assert not torch.equal(more.network["fc.weight"], first.network["fc.weight"])
    own = random_head(3, own=("embedding", "lm_head"), layers=(0, 1, 2))
    kept = trained(base, tmp_path / "c", start=own)
    assert torch.equal(kept.lm_head, own.lm_head)
    with pytest.raises(ValueError, match="from a head of 40 draft tokens and variant 3, the recipe wants 20 and 3"):
        trained(base, tmp_path / "d", replace(RECIPE, vocabulary=20), start=first)
    with pytest.raises(ValueError, match="of 61 draft tokens and variant 1, the recipe wants 40 and 3"):
        trained(base, tmp_path / "e", start=random_head(1))


def test_a_recipe_of_nothing_is_refused(tmp_path):
    for name in ("unrolled", "vocabulary", "points"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            EagleRecipe(**{name: 0})
    with pytest.raises(ValueError, match=r"variant '2' is unknown"):
        EagleRecipe(variant="2")
    with pytest.raises(ValueError, match="none of 1 replies"):
        train_head(tiny(), [Reply([1, 2], [3])], [], RECIPE, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_of_all_families_learn_and_draft(family, tmp_path):
    base = tiny(family, dtype=torch.float32, attention="eager")
    mine = replies(base, 3)
    head = train_head(base, mine, [], replace(RECIPE, steps=2), tmp_path)
    assert all(torch.isfinite(w).all() for w in head.network.values())
    expected = base.generate(prompt(), max_new_tokens=6, do_sample=False)
    model = compose(base, EagleHead(head), budget=16)
    assert torch.equal(model.generate(prompt(), max_new_tokens=6, do_sample=False), expected)


def test_a_layer_of_eagle_1_drafts_from_the_most_frequent_tokens(tmp_path):
    base = tiny(dtype=torch.float32)
    drafter = EagleHead(trained(base, tmp_path / "run", replace(RECIPE, variant="1", vocabulary=20)))
    drafter.save_pretrained(tmp_path / "head")
    back = read_head(tmp_path / "head")
    assert (back.config.version, back.config.draft_vocab_size, len(back.target_ids)) == (1, 20, 20)
    assert torch.equal(back.target_ids, drafter.head.target_ids)
    model = compose(base, tmp_path / "head", budget=16)
    expected = base.generate(prompt(), max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(prompt(), max_new_tokens=12, do_sample=False), expected)
    more = trained(base, tmp_path / "more", replace(RECIPE, variant="1", vocabulary=20), start=back)
    assert torch.equal(more.target_ids, back.target_ids)


class Words:
    """A tokenizer of numbers."""

    chat_template = None

    def __call__(self, text, **kwargs):
        return {"input_ids": [int(word) for word in text.split()]}


def test_from_prompts_to_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PPD_COMPOSE_HOME", str(tmp_path / "home"))
    base = tiny(dtype=torch.float32)
    prompts = [Prompt((" ".join(map(str, prompt(7, seed)[0].tolist())),)) for seed in range(12)]
    drafter = train_eagle(
        base, Words(), prompts, tmp_path / "head", RECIPE, base_name="some/base", held_out=2, reply_tokens=20,
        reply_batch=4, command="ppd-compose train eagle --steps 6", data="numbers",
    )  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "head").iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    back = read_head(tmp_path / "head")
    assert all(torch.equal(w, drafter.head.network[name]) for name, w in back.network.items())
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 1, 2]
    facts = config["ppd_compose"]
    assert facts["base"]["name"] == "some/base"
    assert facts["training"]["unrolled"] == 3
    assert facts["training"]["prompts"] == 11
    assert len(facts["accuracy"]) == 3
    card = (tmp_path / "head" / "README.md").read_text()
    assert "numbers" in card
    assert "40 of the 61 tokens" in card
    compose(base, tmp_path / "head", budget=16).generate(prompt(), max_new_tokens=4, do_sample=False)


def test_a_head_that_training_cannot_go_on_from_is_refused_before_replies_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr("ppd_compose.training_setup.own_replies", lambda *a, **k: pytest.fail("replies were made"))
    start = EagleHead(random_head(1))
    with pytest.raises(ValueError, match="of 61 draft tokens and variant 1, the recipe wants 40 and 3"):
        train_eagle(tiny(dtype=torch.float32), Words(), [Prompt(("1 2",))], tmp_path / "head", RECIPE, start=start)
    assert not (tmp_path / "head").exists()


def test_the_index_of_another_head_is_refused_before_replies_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr("ppd_compose.training_setup.own_replies", lambda *a, **k: pytest.fail("replies were made"))
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds model\.safetensors\.index\.json, which would be read instead"):
        train_eagle(tiny(dtype=torch.float32), Words(), [Prompt(("1 2",))], tmp_path, RECIPE, reply_tokens=12)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors.index.json"]


def test_the_command_passes_its_options_on(tmp_path, monkeypatch, capsys):
    given = {}

    def fake(model, tokenizer, prompts, out, recipe, **settings):
        given.update(settings, recipe=recipe, out=out, prompts=prompts)
        return EagleHead(replace(random_head(3), accuracy=(0.5, 0.25)))

    monkeypatch.setattr(train_module, "train_eagle", fake)
    monkeypatch.setattr("ppd_compose.integrations.eagle.command.load_base", lambda *a: Loaded())
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hi"}\n')
    command(tmp_path / "prompts.jsonl", tmp_path / "out", steps=7, unrolled=2, vocabulary=99, variant="3.1", decay=0.5)
    recipe = given["recipe"]
    assert (recipe.steps, recipe.unrolled, recipe.vocabulary, recipe.variant) == (7, 2, 99, "3.1")
    assert (recipe.decay, recipe.points, recipe.warmup, recipe.seed) == (0.5, 128, 100, 0)
    assert given["prompts"] == [Prompt(("hi",))]
    assert "top-1 by depth 0.50/0.25" in " ".join(capsys.readouterr().err.split())


class Loaded:
    model, tokenizer, name = None, None, "some/base"


def test_training_that_diverges_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="diverged"):
        trained(tiny(dtype=torch.float32), tmp_path, replace(RECIPE, learning_rate=1e30))


def test_an_output_head_that_is_not_in_memory_is_refused():
    head = random_head(3)
    base = tiny(dtype=torch.float32)
    base.lm_head.to("meta")
    with pytest.raises(ValueError, match="neither quantised nor offloaded"):
        borrow(replace(head, lm_head=None, target_ids=None), base)
