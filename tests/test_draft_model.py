"""Draft models: the same tokens whatever they guess, their cache, their forwards, who fits whom, files, training."""

import copy
import json
import shutil
import string

import pytest
import torch
from ppd_compose.integrations.draft_model import DraftModel, forwards
from ppd_compose.integrations.draft_model import train as train_module
from ppd_compose.integrations.draft_model.growth import Growth
from ppd_compose.integrations.draft_model.reading import Ahead, Reading
from ppd_compose.integrations.draft_model.shared import choose_token
from ppd_compose.integrations.draft_model.train import ParallelDraft, PardRecipe, evaluate, make_batch, train_parallel
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_compose import tokenizer
from test_train import replies
from tiny import VOCAB, continuing, prompt, prompt_tokens, tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import GPT2LMHeadModel, MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from ppd_compose import PromptTokens, cli, compose, hookimpl, load_drafter
from ppd_compose.identity import Identity
from ppd_compose.testing import check_drafter, small_base

FAMILIES = ["llama", "gpt2", "qwen3", "gemma3", "opt"]
SHAPES = {
    "chain": {"depth": 4},
    "tree": {"depth": 4, "width": 3},
    "prompt tokens": {"depth": 5, "width": 2, "prompt_tokens": prompt_tokens(3)},
    "prompt tokens looked at": {"depth": 4, "width": 2, "forwards": 3, "prompt_tokens": prompt_tokens(2, 2)},
}


def nearly(base, noise=0.04, seed=0):
    """A draft model that often agrees with `base`: its weights with noise."""
    draft, dice = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in draft.parameters():
            weight += noise * weight.std() * torch.randn(weight.shape, generator=dice, dtype=weight.dtype)
    return draft


def answer(base, ids, tokens=40, **settings):
    return base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, **settings)


def counted(model):
    """The number of rows of each of its forwards, as they come."""
    rows = []

    def note(module, args, kwargs, output):
        rows.append(output.logits.shape[1])

    model.register_forward_hook(note, with_kwargs=True)
    return rows


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_are_those_of_generate(family, shape):
    base = tiny(family)
    ids = prompt(20)
    expected = answer(base, ids, 30)
    for draft, more in ((tiny(family, seed=1), []), (nearly(base), [prompt_tokens(seed=7)])):
        model = compose(base, DraftModel(draft, **SHAPES[shape]), *more, budget=16)
        assert torch.equal(answer(model, ids, 30), expected)


def test_it_passes_the_checks_of_every_drafter():
    check_drafter(lambda base: DraftModel(small_base(seed=1), **SHAPES["prompt tokens looked at"]))


def test_a_draft_model_of_another_family_and_attention():
    base = tiny("llama")
    draft = tiny("gemma2", attention="eager")
    for settings in SHAPES.values():
        assert torch.equal(
            answer(compose(base, DraftModel(draft, **settings), budget=16), prompt()), answer(base, prompt())
        )


@pytest.mark.parametrize("depth", [1, 3, 6])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_the_base_as_its_own_draft_model_is_never_wrong(family, depth):
    base = tiny(family)
    tokens = 1 + 5 * (depth + 1)  # the prefill gives one
    model = compose(base, DraftModel(base, depth), budget=16)
    assert torch.equal(answer(model, prompt(20), tokens), answer(base, prompt(20), tokens))
    assert model.stats.forwards == 6
    assert model.stats.accepted["draft-model"] == model.stats.candidates["draft-model"]


def test_a_tree_and_prompt_tokens_guess_more_than_a_chain():
    base = tiny()
    draft, forwards = nearly(base, 0.08), {}
    for name, settings in {"one": {"depth": 1}, "chain": {"depth": 4}, "tree": {"depth": 4, "width": 4}}.items():
        model = compose(base, DraftModel(draft, **settings), budget=24)
        answer(model, prompt(), 80)
        forwards[name] = model.stats.forwards
    assert forwards["tree"] < forwards["chain"] < forwards["one"] < 80


@pytest.mark.parametrize(
    ("settings", "forwards"),
    [
        ({"depth": 4}, 4),
        ({"depth": 4, "width": 3}, 4),
        ({"depth": 4, "prompt_tokens": prompt_tokens(3)}, 2),
        ({"depth": 4, "prompt_tokens": prompt_tokens(3), "forwards": 1}, 1),
        ({"depth": 4, "width": 2, "prompt_tokens": prompt_tokens(3, 2), "forwards": 1}, 1),
    ],
)
def test_forwards_of_a_step(settings, forwards):
    base = tiny()
    draft = nearly(base)
    rows = counted(draft)
    model = compose(base, DraftModel(draft, **settings), budget=32)
    answer(model, prompt(), 21)
    full = model.stats.forwards - 1  # the prefill asks for no guess
    assert forwards * (full - 3) <= len(rows) <= forwards * full  # near the end there is less to guess
    assert max(model.stats.candidates["draft-model"]) == 4


def test_rows_that_came_true_are_not_run_again():
    base, mine = tiny(), []
    draft = copy.deepcopy(base)
    draft.register_forward_pre_hook(lambda m, a, k: mine.append(k["input_ids"].shape[1]), with_kwargs=True)
    model = compose(base, DraftModel(draft, 3), budget=16)
    answer(model, prompt(12), 13)
    # The prompt and the root; then what was accepted but not looked at, the last guess, comes with the root.
    assert mine == [13, 1, 1, 2, 1, 1, 2, 1, 1]


def random_growth(draft, ids, prompts, seed):
    """A reading that went through guesses of many shapes, some of which came true."""
    dice = torch.Generator().manual_seed(seed)
    done, at = Reading(draft, prompts, VOCAB, 3), 5
    while at < len(ids):
        done.read(ids[:at], int(torch.randint(3, (1,), generator=dice)))
        right, parent = int(torch.randint(4, (1,), generator=dice)), -1
        for i in range(right):
            wrong = (ids[min(at + i, len(ids) - 1)] + 1) % VOCAB
            tokens = [wrong, ids[min(at + i, len(ids) - 1)]]
            done.look(tokens, [parent, parent], int(torch.randint(3, (1,), generator=dice)))
            parent = 2 * i + 1
        at += 1 + int(torch.randint(right + 1, (1,), generator=dice))
    return done


@pytest.mark.parametrize("v", [1, 2])
@pytest.mark.parametrize("family", [*FAMILIES, "mistral"])
def test_the_cache_is_that_of_a_fresh_reading(family, v):
    draft = tiny(family, seed=3)
    prompts, ids = prompt_tokens(2, v).embeddings.double(), prompt(60)[0].tolist()
    for seed in range(2):
        grown, fresh = random_growth(draft, ids, prompts, seed), Reading(draft, prompts, VOCAB, 3)
        told, expected = grown.read(ids, 2), fresh.read(ids, 2)
        assert grown.length == fresh.length == len(ids)
        assert (told.tokens == expected.tokens).all()
        torch.testing.assert_close(torch.tensor(told.log_probs), torch.tensor(expected.log_probs), rtol=1e-5, atol=1e-5)
        for mine, theirs in zip(grown.cache.layers, fresh.cache.layers, strict=True):
            torch.testing.assert_close(mine.keys, theirs.keys)
            torch.testing.assert_close(mine.values, theirs.values)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_look_at_a_tree_is_a_forward_of_every_path(family):
    draft = tiny(family)
    prompts, ids = prompt_tokens(2, 2).embeddings.double(), prompt(20)[0].tolist()
    mine = Reading(draft, prompts, VOCAB, 4)
    mine.read(ids, 0)
    first = mine.look([5, 6], [-1, -1], 2)
    second = mine.look([7, 8, 9], [1, 0, 2], 1)
    for path, told, row in (
        ([5], first, 0),
        ([6], first, 1),
        ([6, 7], second, 0),
        ([5, 8], second, 1),
        ([6, 7, 9], second, 2),
    ):
        known = draft.get_input_embeddings()(torch.tensor([ids + path]))
        own = [draft(inputs_embeds=known).logits[0, -1].softmax(-1)]
        for i in range(told.tokens.shape[1] - 1):
            each = [torch.cat([known, prompts[None, : i + 1, j]], 1) for j in range(2)]
            own.append(torch.stack([draft(inputs_embeds=e).logits[0, -1].softmax(-1) for e in each]).mean(0))
        best = torch.stack(own).topk(4)
        assert told.tokens[row].tolist() == best.indices.tolist()
        torch.testing.assert_close(torch.tensor(told.log_probs[row]), best.values.log(), rtol=1e-4, atol=1e-5)


def test_a_long_prompt_is_read_in_chunks(monkeypatch):
    base = tiny()
    draft = nearly(base)
    rows = counted(draft)
    monkeypatch.setattr(forwards, "CHUNK", 16)
    model = compose(base, DraftModel(draft, 3, 2), budget=16)
    assert torch.equal(answer(model, prompt(100)), answer(base, prompt(100)))
    assert max(rows) <= 6


def ahead(*levels):
    tokens, claims = zip(*levels, strict=True)
    return Ahead(torch.tensor([tokens]).numpy(), torch.tensor([claims], dtype=torch.float64).numpy())


def test_what_the_draft_model_looked_at_takes_the_place_of_prompt_tokens():
    growth = Growth(9, 3, 20, ahead(([1, 2], [-0.5, -1.0]), ([3, 4], [-0.7, -0.9])))
    tree = growth.tree()
    assert (tree.tokens[0], len(tree)) == (9, 7)
    assert growth.pending(3) == ([1, 2, 3], [-1, -1, 0])  # of -0.5, -1.0, -1.2 the last hangs below the first
    tokens, parents = growth.pending(1)
    growth.learn(tokens, parents, ahead(([5, 3], [-0.1, -2.5]), ([7, 8], [-0.3, -3.0])))
    tree = growth.tree()
    one = tree.child(0, 1)
    assert sorted(tree.tokens[tree.parents == one].tolist()) == [3, 5]
    five, three = tree.child(one, 5), tree.child(one, 3)
    assert tree.log_probs[[five, three]].tolist() == pytest.approx([-0.6, -3.0])
    assert tree.log_probs[tree.child(five, 7)] == pytest.approx(-0.9)
    two = tree.child(0, 2)
    assert sorted(tree.tokens[tree.parents == two].tolist()) == [3, 4]
    assert growth.pending(9) == ([2, 3, 4, 5, 3], [-1, 1, 1, 0, 0])  # none at depth 3: there is no room below
    growth.size = 3
    assert growth.tree().tokens.tolist() == [9, 1, 5]


def test_a_guess_that_the_draft_model_does_not_share_is_dropped():
    growth = Growth(9, 3, 20, ahead(([1], [-0.5]), ([3], [-0.7])))
    growth.learn(*growth.pending(2), Ahead(*(torch.tensor(x).numpy() for x in ([[[5]], [[6]]], [[[-0.1]], [[-0.2]]]))))
    tree = growth.tree()
    assert tree.tokens.tolist() == [9, 1, 5]


def test_claims_are_the_log_probs_of_the_draft_model():
    base = tiny()
    draft = nearly(base)
    seen = []

    class Watch:
        @hookimpl
        def observe(self, step):
            seen.append((list(step.ids), step.tree, step.path))

    answer(compose(base, DraftModel(draft, 3), budget=8, plugins=[Watch()]), prompt(), 12)
    ids, tree, path = seen[1]
    context = ids[: len(ids) - len(path)]
    logits = draft(torch.tensor([context + tree.tokens[1:].tolist()])).logits[0].log_softmax(-1)
    claims = [logits[len(context) - 1 + i, token].item() for i, token in enumerate(tree.tokens[1:].tolist())]
    assert tree.log_probs[1:].tolist() == pytest.approx(torch.tensor(claims).cumsum(0).tolist(), abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_same_seed_same_tokens_when_sampling(shape):
    base = tiny()
    model = compose(base, DraftModel(nearly(base), **SHAPES[shape]), budget=16)
    for settings in ({}, {"temperature": 0.4, "top_k": 8, "repetition_penalty": 1.2}):
        told = []
        for each in (base, model):
            torch.manual_seed(3)
            told.append(each.generate(prompt(), max_new_tokens=30, do_sample=True, **settings))
        assert torch.equal(*told)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_chat_goes_on_and_a_prompt_comes_in_chunks(family):
    base = tiny(family)
    model = compose(base, DraftModel(nearly(base), 3, 2), budget=16)
    turn = model.generate(prompt(), max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([turn.sequences, prompt(6, seed=3)], dim=1)
    expected = answer(base, longer, 20)
    assert torch.equal(answer(model, longer, 20, **continuing(turn)), expected)
    assert torch.equal(answer(model, longer, 20, prefill_chunk_size=5), expected)
    fresh = torch.cat([turn.sequences[:, -1:], prompt(6, seed=3)], dim=1)
    turn = base.generate(prompt(), max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    told = model.generate(
        fresh, attention_mask=torch.ones_like(longer), **continuing(turn), max_new_tokens=20,
        do_sample=False,
    )  # fmt: skip
    assert torch.equal(told[:, fresh.shape[1] :], expected[:, longer.shape[1] :])


def test_left_padding():
    base = tiny()
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), prompt()], dim=1)
    mask = (padded > 0).long()
    expected = base.generate(padded, attention_mask=mask, max_new_tokens=20, do_sample=False)
    model = compose(base, DraftModel(nearly(base), 3, 2), budget=16)
    assert torch.equal(model.generate(padded, attention_mask=mask, max_new_tokens=20, do_sample=False), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draft_model_in_another_dtype(dtype):
    base = tiny()
    for settings in SHAPES.values():
        model = compose(base, DraftModel(nearly(base).to(dtype), **settings), budget=16)
        assert torch.equal(answer(model, prompt()), answer(base, prompt()))
        assert model.stats.tokens_per_forward > 1.5


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_up_to_the_last_position_and_beyond_that_of_the_draft_model(family):
    base = tiny(family)
    expected = base.generate(prompt(140), max_length=160, do_sample=False)
    name = "n_positions" if family == "gpt2" else "max_position_embeddings"
    draft = nearly(base)
    for settings in SHAPES.values():
        model = compose(base, DraftModel(draft, **settings), budget=16)
        assert torch.equal(model.generate(prompt(140), max_length=160, do_sample=False), expected)
    setattr(draft.config, name, 150)
    rows = counted(draft)
    for settings in SHAPES.values():
        model = compose(base, DraftModel(draft, **settings), budget=16)
        assert torch.equal(model.generate(prompt(140), max_length=160, do_sample=False), expected)
    assert rows


def test_the_draft_model_and_the_base_are_left_as_they_were():
    base = tiny()
    draft = nearly(base)
    before = {name: value.clone() for name, value in draft.state_dict().items()}
    config, names = copy.deepcopy(draft.config.to_dict()), set(vars(draft))
    answer(compose(base, DraftModel(draft, 3, 2, prompt_tokens()), budget=16), prompt())
    assert all(torch.equal(before[name], value) for name, value in draft.state_dict().items())
    assert draft.config.to_dict() == config
    assert set(vars(draft)) == names


@pytest.mark.parametrize("settings", [{"depth": 0}, {"width": 0}, {"forwards": 0}])
def test_senseless_settings_are_refused(settings):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        DraftModel(tiny(), **settings)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"got 'a/folder': use DraftModel.from_pretrained"):
        DraftModel("a/folder")


def test_no_forward_for_guesses_that_cannot_be_verified():
    base, draft = tiny(), tiny(seed=1)
    rows = counted(draft)
    assert torch.equal(answer(compose(base, DraftModel(draft), budget=1), prompt()), answer(base, prompt()))
    assert not rows


def sized(vocab, seed=1):
    """A draft model with a vocabulary of its own size."""
    draft = tiny(seed=seed)
    draft.resize_token_embeddings(vocab)
    return draft


def test_vocabularies_that_differ_by_padding():
    base = tiny()
    for draft in (sized(VOCAB + 100), sized(50)):
        model = compose(base, DraftModel(draft, 3, 4), budget=16)
        assert torch.equal(answer(model, prompt()), answer(base, prompt()))
    with pytest.raises(ValueError, match="the draft model has 200 tokens and the base 61, more apart than padding"):
        compose(base, DraftModel(sized(200)))


def test_a_token_that_the_draft_model_does_not_have_ends_its_guesses():
    base, draft = tiny(), sized(50)
    rows = counted(draft)
    ids = torch.tensor([[4, 55, 6]])
    assert torch.equal(answer(compose(base, DraftModel(draft), budget=8), ids), answer(base, ids))
    assert not rows


def words(characters):
    inner = Tokenizer(WordLevel({c: i for i, c in enumerate(characters)}, unk_token="?"))
    inner.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")


def test_tokenizers_are_compared_where_they_are_known(tmp_path):
    base = tiny()
    base.config.name_or_path = str(tmp_path)
    own = "?" + string.ascii_letters + "01234567"
    draft = DraftModel(tiny(seed=1), tokenizer=words(own.replace("c", "!")))
    compose(base, draft)  # the base's tokenizer is not known
    words(own).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="token 3 is '!' for the draft model and 'c' for the base"):
        compose(base, draft)
    compose(base, DraftModel(tiny(seed=1), tokenizer=words(own)))
    compose(base, DraftModel(sized(50), tokenizer=words(own[:50])))
    many = [chr(at) for at in range(0x100, 0x100 + 300)]
    words(["?", *many]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks 240 of the base's 301 tokens"):
        compose(base, DraftModel(tiny(seed=1), tokenizer=words(["?", *many[:60]])))


def test_other_special_tokens_are_a_warning():
    base, draft = tiny(), tiny(seed=1)
    draft.generation_config.bos_token_id = 5
    with pytest.warns(UserWarning, match=r"bos_token_id is \[5\] for the draft model and \[1\] for the base"):
        compose(base, DraftModel(draft))


def test_models_that_cannot_draft_are_refused():
    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(ValueError, match="the draft model cannot draft: MambaForCausalLM"):
        compose(tiny(), DraftModel(mamba))
    flex = tiny(seed=1)
    flex.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="the draft model cannot draft: attn_implementation='flex_attention'"):
        compose(tiny(), DraftModel(flex))
    with pytest.raises(ValueError, match="not in memory"):
        compose(tiny(), DraftModel(tiny(seed=1).to("meta")))
    with pytest.raises(ValueError, match="trained for a base of hidden size 16"):
        compose(tiny(), DraftModel(tiny(seed=1), prompt_tokens=prompt_tokens(hidden=16)))


# Files.


@pytest.fixture
def folder(tmp_path):
    draft = tiny(seed=1, dtype=torch.float32)
    draft.generation_config.max_length = None
    draft.save_pretrained(tmp_path / "draft")
    tokenizer().save_pretrained(tmp_path / "draft")
    return tmp_path / "draft"


def test_from_a_folder_and_by_load_drafter(folder):
    base, kept = tiny(), tiny(seed=1, dtype=torch.float32)
    for drafter in (load_drafter(folder), DraftModel.from_pretrained(folder, dtype="float32", depth=3, width=2)):
        assert isinstance(drafter, DraftModel)
        assert torch.equal(drafter.model(prompt()).logits, kept(prompt()).logits)
        assert drafter.tokenizer.get_vocab() == tokenizer().get_vocab()
        assert torch.equal(answer(compose(base, drafter, budget=8), prompt()), answer(base, prompt()))
    assert (drafter.depth, drafter.width, drafter.model.dtype) == (3, 2, torch.float32)
    assert load_drafter(folder).depth == 4
    assert DraftModel.from_pretrained(folder, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_it_follows_the_base_to_its_device_unless_told_where_to_be(folder, monkeypatch):
    for device, expected in ((None, [torch.device("cpu")]), ("cpu", [])):
        drafter, moved = DraftModel.from_pretrained(folder, device=device), []
        monkeypatch.setattr(drafter.model, "to", moved.append)
        compose(tiny(), drafter)
        assert moved == expected


def test_in_several_files(folder):
    whole = load_drafter(folder).model
    whole.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    assert torch.equal(load_drafter(folder).model(prompt()).logits, whole(prompt()).logits)


def test_what_a_draft_folder_is():
    config, files = (
        {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 4},
        {"config.json", "model.safetensors"},
    )
    assert DraftModel.recognises(config, files)
    assert DraftModel.recognises({"architectures": ["GPT2LMHeadModel"]}, {"model.safetensors.index.json"})
    assert not DraftModel.recognises(config, {"config.json", "pytorch_model.bin"})
    assert not DraftModel.recognises({**config, "architectures": ["T5ForConditionalGeneration"]}, files)
    assert not DraftModel.recognises({}, files)
    for foreign in ({"medusa_num_heads": 3}, {"draft_vocab_size": 9}, {"bias": False, "num_hidden_layers": 1}):
        assert not DraftModel.recognises({**config, **foreign}, files)
    assert not DraftModel.recognises(config, {*files, "medusa_lm_head.safetensors"})
    one = {**config, "num_hidden_layers": 1}
    assert DraftModel.recognises(one, {*files, "tokenizer.json"})
    assert not DraftModel.recognises(one, files)


def test_pickles_and_other_folders_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin is a pickle and is not opened"):
        DraftModel.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        DraftModel.from_pretrained(folder / "nowhere")


# One shared prompt token.


def parallel(token=60, **settings):
    draft = tiny(seed=1)
    draft.config.pard_token = token
    return DraftModel(draft, **settings)


@pytest.mark.parametrize("key", ["pard_token", "ptd_token_id"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_shared_prompt_token_drafts_all_in_one_forward(family, key):
    base, draft = tiny(family), tiny(family, seed=1)
    setattr(draft.config, key, 60)
    rows, ids = counted(draft), prompt(20)
    drafter = DraftModel(draft, 5)
    model = compose(base, drafter, budget=8)
    assert torch.equal(answer(model, ids, 2), answer(base, ids, 2))
    assert rows == []  # there is no room for a guess
    assert torch.equal(answer(model, ids, 20), answer(base, ids, 20))
    assert rows[0] == 5
    assert len(rows) == model.stats.forwards - 2
    told = Reading(draft, drafter._prompts(), VOCAB, 1).read(ids[0].tolist(), 4)
    masked = torch.cat([ids, torch.full((1, 4), 60)], dim=1)
    assert told.tokens[0, :, 0].tolist() == draft(masked).logits[0, -5:].argmax(-1).tolist()


@pytest.mark.parametrize("token", [VOCAB, -1, "60", True])
def test_a_shared_prompt_token_outside_the_vocabulary_is_refused(token):
    with pytest.raises(ValueError, match=f"pard_token={token!r}: it must be a whole number from 0 to 60"):
        parallel(token)


def test_prompt_tokens_given_take_the_place_of_the_shared_one():
    drafter = parallel(depth=4, prompt_tokens=prompt_tokens(2))
    assert (drafter.n, drafter.forwards) == (2, 2)
    assert (parallel(depth=4).n, parallel(depth=4).forwards, parallel(depth=1).n) == (3, 1, 0)


def test_the_token_that_becomes_the_shared_one():
    config, own = tiny().config, tokenizer()
    assert choose_token("Z", config, own) == own.get_vocab()["Z"]
    assert choose_token("60", config, own) == 60
    with pytest.raises(ValueError, match="'nothing' is no token of this vocabulary of 61"):
        choose_token("nothing", config, own)
    with pytest.raises(ValueError, match="uses all 61 rows"):
        choose_token(None, config, own)
    config.vocab_size = 70
    assert choose_token(None, config, own) == 69


RECIPE = PardRecipe(steps=6, batch_size=2, points=5, checkpoint_every=2, warmup=1, tokens=4, learning_rate=1e-2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt"])
def test_the_loss_is_that_of_what_the_sequences_hold(family):
    """Batch, padding, dropped distances and mask at once, against one forward for every point."""
    draft = tiny(family)
    module = ParallelDraft(draft, 60, RECIPE)
    ids = [torch.randint(2, 60, (length,), generator=torch.Generator().manual_seed(length)) for length in (9, 13)]
    batch = train_module.PardBatch(
        torch.nn.utils.rnn.pad_sequence(ids, batch_first=True), torch.tensor([[3, -1], [4, 7]]), torch.tensor([3, 2])
    )
    losses = {distance: [] for distance in range(4)}
    for sequence, point, reach in ((0, 3, 3), (1, 4, 3), (1, 7, 2)):
        row = ids[sequence]
        logits = draft(torch.cat([row[: point + 1], torch.full((reach,), 60)])[None]).logits[0, point:].log_softmax(-1)
        for distance in range(reach + 1):
            losses[distance].append(-logits[distance, row[point + 1 + distance]])
    weights = RECIPE.decay ** torch.arange(4)
    expected = sum(weights[d] * torch.stack(found).mean() for d, found in losses.items()) / weights.sum()
    torch.testing.assert_close(module(batch).loss, expected.float(), rtol=1e-5, atol=1e-5)


def test_distances_are_dropped_by_share():
    base = tiny(dtype=torch.float32)
    recipe = PardRecipe(tokens=5, points=10, retained=0.5, least=0.2)
    batch = make_batch(replies(base, 3), recipe, 0)
    count = batch.points.shape[1]
    assert sorted(batch.reach.tolist()) == sorted(
        1 + (i < count / 2) + (i < count / 4) + (i < count / 5) for i in range(count)
    )
    assert (make_batch(replies(base, 3), PardRecipe(tokens=5, retained=1.0), 0).reach == 4).all()


def pupil(weights="all", family="llama"):
    return tiny(family, seed=3, dtype=torch.float32), PardRecipe(**{**vars(RECIPE), "weights": weights})


def test_training_lowers_the_loss(tmp_path):
    mine = replies(tiny(dtype=torch.float32))
    for weights, rate, least in (("all", 3e-3, 0.7), ("token", 1e-1, 0.95)):
        draft, _ = pupil()
        recipe = PardRecipe(steps=40, points=8, warmup=1, tokens=3, learning_rate=rate, weights=weights)
        batch = make_batch(mine, recipe, 0)
        before = ParallelDraft(copy.deepcopy(draft), 60, recipe)(batch).loss
        told = train_parallel(draft, 60, mine, mine[:2], recipe, tmp_path / weights)
        module = ParallelDraft(draft, 60, recipe)
        assert module(batch).loss < least * before
        assert told == evaluate(module, mine[:2], recipe)
        assert len(told) == 3


def test_the_token_alone_is_trained(tmp_path):
    for family in ("llama", "gemma3"):  # the latter's output head shares the embedding
        draft, recipe = pupil("token", family)
        before = {name: value.clone() for name, value in draft.state_dict().items()}
        train_parallel(draft, 60, replies(tiny(dtype=torch.float32)), [], recipe, tmp_path / family)
        embedding = draft.get_input_embeddings().weight
        for name, value in draft.state_dict().items():
            changed = (value != before[name]).nonzero()[:, 0].unique().tolist()
            assert changed == ([60] if torch.equal(value, embedding) else []), name


@pytest.mark.parametrize("weights", ["all", "token"])
@pytest.mark.parametrize("killed_at", [1, 4])
def test_killed_at_any_step_it_resumes_to_the_same_weights(tmp_path, monkeypatch, killed_at, weights):
    mine, (whole, recipe), (cut, _) = replies(tiny(dtype=torch.float32)), pupil(weights), pupil(weights)
    train_parallel(whole, 60, mine, [], recipe, tmp_path / "whole")
    draw, count = train_module.make_batch, [0]

    def fails(*args):
        count[0] += 1
        if count[0] == killed_at:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(train_module, "make_batch", fails)
    with pytest.raises(KeyboardInterrupt):
        train_parallel(cut, 60, mine, [], recipe, tmp_path / "cut")
    again, _ = pupil(weights)
    train_parallel(again, 60, mine, [], recipe, tmp_path / "cut")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


def test_a_checkpoint_of_another_shared_token_is_refused(tmp_path):
    mine, (draft, recipe) = replies(tiny(dtype=torch.float32)), pupil()
    train_parallel(draft, 60, mine, [], recipe, tmp_path)
    again, _ = pupil()
    with pytest.raises(ValueError, match="another recipe"):
        train_parallel(again, 59, mine, [], recipe, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 1}, "tokens must be at least 2, got 1"),
        ({"retained": 0.0}, "shares of the points"),
        ({"weights": "some"}, "weights must be 'all' or 'token', got 'some'"),
    ],
)
def test_senseless_recipes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PardRecipe(**settings)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base that never writes token 60, a draft model, and prompts."""
    folder = tmp_path_factory.mktemp("place")
    base, draft = tiny(dtype=torch.float32, eos=59), tiny("gpt2", seed=3, dtype=torch.float32)
    base.generation_config.suppress_tokens = [60]
    for name, model in (("base", base), ("draft", draft)):
        model.generation_config.max_length = None
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    lines = [{"prompt": f"ab{letter}de"} for letter in string.ascii_lowercase[:12]]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def trains(place, out, *more):
    words = [
        "train", "pard", "--prompts", place / "prompts.jsonl", "--base", place / "base", "--draft", place / "draft",
        "--out", out, "--dtype", "float32", "--tokens", 3, "--steps", 3, "--points", 6, "--reply-tokens", 12, *more,
    ]  # fmt: skip
    return CliRunner().invoke(cli.app, [str(word) for word in words], catch_exceptions=False)


def test_train_pard_writes_a_folder_that_drafts_here_and_in_vllm(place, tmp_path):
    before = {path.name: path.read_bytes() for path in (place / "draft").iterdir()}
    told = trains(place, tmp_path / "out", "--token", "60")
    assert told.exit_code == 0
    assert {path.name: path.read_bytes() for path in (place / "draft").iterdir()} == before
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["pard_token"], config["spd_type"], config["architectures"]) == (60, "pard", ["GPT2LMHeadModel"])
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == before["tokenizer.json"]
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir() or path.name.startswith(".")]
    card = (tmp_path / "out" / "README.md").read_text()
    assert '"parallel_drafting": true, "num_speculative_tokens": 3' in card
    assert "stands token 60 up to 2 times" in card
    assert str(place) not in card
    drafter = load_drafter(tmp_path / "out")
    assert (drafter.shared, drafter.depth, drafter.forwards) == (60, 3, 1)
    base = tiny()
    ids = prompt().clamp(max=50)
    assert torch.equal(answer(compose(base, drafter, budget=8), ids), answer(base, ids))
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(
        torch.equal(weights[name], value) for name, value in drafter.model.state_dict().items() if name in weights
    )


def test_the_card_names_base_and_draft_model_as_they_are_called(place, tmp_path, monkeypatch):
    cached = tmp_path / "models--Nice--Draft" / "snapshots" / ("0" * 40)
    shutil.copytree(place / "draft", cached)
    monkeypatch.chdir(place / "base")
    out = tmp_path / "out[/1]:b:"
    told = trains(place, out, "--token", "60", "--draft", cached, "--base", ".")
    assert f"draft model in {out}, shared prompt token 60" in told.stderr
    card = (out / "README.md").read_text()
    assert card.startswith('---\nbase_model: "Nice/Draft"\n')
    assert "vllm serve base " in card


def test_a_draft_model_that_does_not_fit_on_the_disk_is_told_with_its_folder(place, tmp_path, monkeypatch):
    def full(model, folder):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", full)
    with pytest.raises(OSError, match=r"out cannot be written .*No space left"):
        trains(place, tmp_path / "out", "--token", "60")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".checkpoints"]


def test_train_pard_goes_on_from_its_own_folder_and_refuses_what_it_cannot_train(place, tmp_path):
    trains(place, tmp_path / "first", "--token", "60", "--only-token")
    again = DraftModel.from_pretrained(tmp_path / "first")
    kept = load_file(place / "draft" / "model.safetensors")["transformer.wte.weight"]
    assert (again.model.get_input_embeddings().weight != kept).nonzero()[:, 0].unique().tolist() == [60]
    trains(place, tmp_path / "second", "--draft", tmp_path / "first")
    assert load_drafter(tmp_path / "second").shared == 60
    with pytest.raises(ValueError, match="uses all 61 rows"):
        trains(place, tmp_path / "third")
    with pytest.raises(ValueError, match=r"token 4 is in the base's prompts or replies"):
        trains(place, tmp_path / "third", "--token", "4")
    with pytest.raises(ValueError, match="stays as it is"):
        trains(place, place / "draft", "--token", "60")


def test_prompt_tokens_of_another_model_are_noticed():
    draft = tiny(seed=1)
    own = prompt_tokens()
    mine = PromptTokens(own.embeddings, own.accuracy.tolist(), Identity.of(tiny(seed=2)))
    with pytest.warns(UserWarning, match="other weights"):
        compose(tiny(), DraftModel(draft, prompt_tokens=mine))
