"""Prefixes: keys and values before the sequence that appended rows alone see; in decoding, training and files."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from ppd_compose.integrations.draft_model import DraftModel
from ppd_compose.integrations.draft_model.reading import Reading
from test_lossless import PAIRS
from test_prompt import Watches
from test_train import replies
from tiny import FAMILIES, VOCAB, Oracle, continuing, prompt, prompt_tokens, tiny
from transformers import DynamicCache

from ppd_compose import PPDConfig, PromptTokens, compose, hookimpl
from ppd_compose.adapter import CONFIG, TENSORS, read_adapter
from ppd_compose.cache import GENERATE_NAME, whole_context, with_cache
from ppd_compose.distill import PromptRows
from ppd_compose.identity import Identity
from ppd_compose.prefix import in_eight_bits
from ppd_compose.train import PromptRecipe, first_rows, initial_prefix, make_batch, train_prompt_tokens
from ppd_compose.train_job import train_ppd

WHOLE = [pair for pair in PAIRS if pair[0] != "mistral"]  # all its layers have windows
RECIPE = PromptRecipe(num_prompt_tokens=2, prefix=2, steps=40, points=8, learning_rate=3e-2, warmup=1)


def with_prefix(base, n=3, v=1, columns=2, seed=0, identity=None):
    shape = initial_prefix(base, PromptRecipe(prefix=columns)).shape
    states = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    made = prompt_tokens(n, v, seed=seed)
    return PromptTokens(made.embeddings, made.accuracy.tolist(), identity, prefix=states)


def greedy(model, ids, tokens=40, **more):
    return model.generate(ids, max_new_tokens=tokens, do_sample=False, **more)


@pytest.mark.parametrize(("family", "attention"), WHOLE)
def test_the_tokens_are_those_of_generate(family, attention):
    base = tiny(family, attention=attention)
    ids = prompt(14)
    expected = greedy(base, ids)
    for n, v, columns, rows in ((1, 1, 1, 8), (3, 2, 3, 40)):
        oracle = Oracle(expected[0].tolist())
        model = compose(base, with_prefix(base, n, v, columns), oracle, budget=rows)
        assert torch.equal(greedy(model, ids), expected), (n, v, rows)
        assert model.stats.forwards < 30
        assert torch.equal(greedy(base, ids), expected)


@pytest.mark.parametrize("way", ["packed", "compile"])
def test_packed_and_compiled_forwards(way):
    base = tiny(dtype=torch.float32)
    expected = greedy(base, prompt(), 24)
    model = compose(base, with_prefix(base), Oracle(expected[0].tolist()), budget=24, **{way: True})
    assert torch.equal(greedy(model, prompt(), 24), expected)


def told_alone(base, ids, chain, states):
    """What the model says after `ids` and the embeddings `chain`, which see `states` before them."""
    cache = DynamicCache(config=base.config)
    base(input_ids=torch.tensor([ids]), **with_cache(base, cache))
    for layer, (keys, values) in zip(whole_context(cache), states.to(base.dtype), strict=True):
        layer.keys, layer.values = torch.cat([keys[None], layer.keys], -2), torch.cat([values[None], layer.values], -2)
    rows, columns = len(chain), states.shape[3] + len(ids)
    see = torch.ones(rows, columns + rows, dtype=torch.bool).tril(columns)[None, None]
    at = torch.arange(len(ids), len(ids) + rows)[None]
    out = base(inputs_embeds=chain[None], attention_mask=see, position_ids=at, **with_cache(base, cache))
    return out.logits[0, -1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3"])
def test_an_answer_saw_the_prefix_the_sequence_and_the_prompt_tokens_before_it(family):
    base = tiny(family)
    first, second = with_prefix(base, 2, 2, 3), with_prefix(base, 1, 1, 1, seed=1)
    second.name = "second"
    watches = [Watches(first), Watches(second)]
    oracle = Oracle(greedy(base, prompt())[0].tolist())
    for number, watch in enumerate(watches):
        watch.name = f"watch-{number}"
    greedy(compose(base, first, second, oracle, plugins=watches, budget=64), prompt(), 25)
    for watch in watches:
        drafter, compared = watch.drafter, 0
        for ids, told in watch.seen:
            for row, kind in enumerate(told.kinds.tolist()):
                i, j = divmod(kind, drafter.embeddings.shape[1])
                chain = drafter.embeddings[: i + 1, j].to(base.dtype)
                torch.testing.assert_close(told.logits[row], told_alone(base, ids, chain, drafter.keys_values))
                compared += 1
        assert compared > 2


def test_a_chat_goes_on_from_the_cache_that_comes_back():
    base = tiny()
    model = compose(base, with_prefix(base), budget=24)
    turns = [greedy(m, prompt(), 12, return_dict_in_generate=True) for m in (base, model)]
    lengths = {layer.keys.shape[-2] for layer in turns[1][GENERATE_NAME].layers}
    assert lengths == {turns[0].sequences.shape[1] - 1}
    longer = torch.cat([turns[0].sequences, prompt(5, 3)], dim=1)
    expected, told = (greedy(m, longer, 12, **continuing(turn)) for m, turn in zip((base, model), turns, strict=True))
    assert torch.equal(told, expected)


def test_a_call_that_is_broken_off_leaves_the_cache_as_it_was_said():
    base = tiny()
    cache = DynamicCache(config=base.config)

    def stop(ids, scores, **_):
        if ids.shape[1] > 20:
            raise KeyboardInterrupt
        return torch.zeros(1, dtype=torch.bool)

    with pytest.raises(KeyboardInterrupt):
        greedy(
            compose(base, with_prefix(base), budget=16), prompt(), stopping_criteria=[stop], **{GENERATE_NAME: cache}
        )
    alone = DynamicCache(config=base.config)
    said = greedy(base, prompt(), 9)
    base(input_ids=said[:, : cache.get_seq_length()], **with_cache(base, alone))
    for mine, theirs in zip(cache.layers, alone.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys)
        torch.testing.assert_close(mine.values, theirs.values)


@pytest.mark.parametrize("other", ["layers", "heads", "sizes"])
def test_a_prefix_for_another_base_is_refused_by_compose(other):
    fits = with_prefix(tiny())
    states = {"layers": fits.keys_values[:2], "heads": fits.keys_values[:, :, :1], "sizes": fits.keys_values[..., :4]}
    tokens = PromptTokens(fits.embeddings, prefix=states[other])
    with pytest.raises(ValueError, match="this prefix was made for another base"):
        compose(tiny(), tokens)
    with pytest.raises(ValueError, match="this prefix was made for another base"):
        compose(tiny(), DraftModel(tiny(seed=1), prompt_tokens=tokens))
    with pytest.raises(ValueError, match="this prefix was made for another base"):
        train_ppd(tiny(), None, [], Path("out"), PromptRecipe(prefix=2), start=tokens)


def test_composing_with_a_prefix_changes_nothing_of_the_base():
    base = tiny().train()
    fits = with_prefix(tiny())
    state = torch.get_rng_state()
    compose(base, fits)
    assert base.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_drafter_s_own_prefix_of_other_layers_is_refused_and_the_cache_stays():
    class Wrong:
        name = "wrong"

        @hookimpl
        def prefix(self):
            return torch.zeros(2, 2, 2, 1, 8)

    base = tiny()
    cache = DynamicCache(config=base.config)
    with pytest.raises(ValueError, match=r"a prefix of \(2, 2, 2, 1, 8\) does not fit"):
        greedy(compose(base, with_prefix(base), Wrong(), budget=8), prompt(), **{GENERATE_NAME: cache})
    assert {layer.keys.shape[-2] for layer in cache.layers} == {12}


@pytest.mark.parametrize("shape", [(3, 2, 2, 4), (3, 1, 2, 2, 8), (3, 2, 2, 0, 8), (3, 2, 2, 300, 8)])
def test_what_is_no_prefix_is_refused(shape):
    with pytest.raises(ValueError, match="a prefix must be"):
        PromptTokens(torch.zeros(1, 1, 32), prefix=torch.zeros(shape))


def test_a_prefix_may_be_of_eight_bits_but_not_of_whole_numbers():
    states = torch.ones(3, 2, 2, 1, 8)
    assert (
        PromptTokens(torch.zeros(1, 1, 32), prefix=states.to(torch.float8_e4m3fn)).keys_values.dtype == torch.bfloat16
    )
    with pytest.raises(ValueError, match="a Tensor of floats"):
        PromptTokens(torch.zeros(1, 1, 32), prefix=states.long())


@pytest.mark.parametrize("number", [float("nan"), float("-inf"), 1e5])
def test_numbers_that_would_spoil_a_forward_are_refused(number):
    """A row that computes with NaN is hidden from the others, but nothing times NaN is NaN."""
    with pytest.raises(ValueError, match="a prefix holds NaN or values beyond 10000"):
        PromptTokens(torch.zeros(1, 1, 32), prefix=torch.full((3, 2, 2, 1, 8), number))
    with pytest.raises(ValueError, match="prompt tokens hold NaN or values beyond 10000"):
        PromptTokens(torch.full((1, 1, 32), number))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_a_draft_model_s_prompt_tokens_see_their_prefix(family):
    draft = tiny(family)
    made, ids = with_prefix(draft, 2, 1, 3), prompt(20)[0].tolist()
    mine = Reading(draft, made.embeddings.double(), VOCAB, 4, made.keys_values)
    mine.read(ids, 0)
    first, second = mine.look([5, 6], [-1, -1], 2), mine.look([7], [1], 1)
    for path, told, row in (([5], first, 0), ([6], first, 1), ([6, 7], second, 0)):
        own = [draft(torch.tensor([ids + path])).logits[0, -1]]
        for i in range(1, told.tokens.shape[1]):
            own.append(told_alone(draft, ids + path, made.embeddings[:i, 0].double(), made.keys_values))
        best = torch.stack(own).softmax(-1).topk(4)
        assert told.tokens[row].tolist() == best.indices.tolist()
        torch.testing.assert_close(torch.tensor(told.log_probs[row]), best.values.log(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_draft_model_with_a_prefix_leaves_the_tokens_as_they_are(family):
    base, draft = tiny(family), tiny(family, seed=1)
    drafter = DraftModel(draft, depth=4, width=2, prompt_tokens=with_prefix(draft, 2))
    assert torch.equal(greedy(compose(base, drafter, budget=24), prompt()), greedy(base, prompt()))


# Training


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mistral"])
def test_a_prefix_learns_on_all_families(family):
    base = tiny(family, dtype=torch.float32, attention="eager")
    recipe = PromptRecipe(**{**vars(RECIPE), "max_length": 13})  # within the window of 16
    rows = PromptRows(torch.zeros(2, 1, 32), initial_prefix(base, recipe))
    rows(base, make_batch(replies(base, 2), recipe, 0), 0.8).loss.backward()
    assert torch.isfinite(rows.scaled.grad).all()
    assert rows.scaled.grad.abs().sum() > 0


def test_a_prefix_alone_lowers_the_loss():
    base = tiny(dtype=torch.float32)
    batch = make_batch(replies(base), RECIPE, 0)
    made = prompt_tokens(2)
    rows = PromptRows(made.embeddings, initial_prefix(base, RECIPE))
    optimizer = torch.optim.Adam([rows.scaled], lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = rows(base, batch, 0.8).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]


def test_the_same_seed_trains_the_same_prefix(tmp_path):
    base = tiny(dtype=torch.float32)
    mine = replies(base)
    first, second = (train_prompt_tokens(base, mine, mine[:1], RECIPE, tmp_path / name) for name in ("a", "b"))
    assert torch.equal(first.prefix, second.prefix)
    assert torch.equal(first.embeddings, second.embeddings)
    assert first.prefix.shape == (3, 2, 2, 2, 8)


def test_training_goes_on_from_a_prefix(tmp_path):
    base = tiny(dtype=torch.float32)
    mine = replies(base)
    start = with_prefix(base, 2, columns=2)
    still = PromptRecipe(**{**vars(RECIPE), "steps": 1, "learning_rate": 1e-9})
    made = train_prompt_tokens(
        base, mine, mine[:1], still, tmp_path, first_rows(base, still, start.embeddings, start.keys_values)
    )
    torch.testing.assert_close(made.prefix, in_eight_bits(start.keys_values))
    wider = PromptRecipe(**{**vars(still), "prefix": 3})
    with pytest.raises(ValueError, match="start from a prefix of 2, the recipe wants 3"):
        first_rows(base, wider, start.embeddings, start.keys_values)


def test_a_base_of_windows_alone_learns_no_prefix(tmp_path):
    base = tiny("mistral", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"takes no prefix: 0 of its layers .* \(--prefix 0\)"):
        train_prompt_tokens(base, replies(base), replies(base, 1), RECIPE, tmp_path)
    with pytest.raises(ValueError, match="takes no prefix"):  # before the prompts are looked at
        train_ppd(base, None, [], tmp_path / "out", RECIPE)


def test_a_recipe_of_a_negative_prefix_is_refused():
    with pytest.raises(ValueError, match="prefix must be at least 0, got -1"):
        PromptRecipe(prefix=-1)


# Files


@pytest.fixture
def saved(tmp_path):
    base = tiny()
    tokens = with_prefix(base, 2, 2, 3, identity=Identity.of(base))
    tokens.save_pretrained(tmp_path / "adapter")
    return tokens, tmp_path / "adapter"


def test_a_prefix_goes_to_files_and_back(saved):
    tokens, folder = saved
    again = PromptTokens.from_pretrained(folder)
    assert torch.equal(again.embeddings, tokens.embeddings)
    assert torch.equal(again.keys_values, tokens.keys_values)
    config = json.loads((folder / CONFIG).read_text())
    assert (config["format_version"], config["prefix"]) == (2, [3, 2, 2, 3, 8])
    assert "with keys and values of their own in 3 layers (416 parameters)" in (folder / "README.md").read_text()


def test_half_precision_stays_in_files(saved, tmp_path):
    tokens, _ = saved
    half = PromptTokens(
        tokens.embeddings.bfloat16(), tokens.accuracy.tolist(), tokens.identity, prefix=tokens.keys_values.bfloat16()
    )
    half.save_pretrained(tmp_path / "half")
    again = PromptTokens.from_pretrained(tmp_path / "half")
    assert again.keys_values.dtype == again.embeddings.dtype == torch.bfloat16
    assert torch.equal(again.keys_values, half.keys_values)


def test_a_prefix_of_eight_bits_takes_a_byte_a_number_in_files_and_nothing_is_lost(saved, tmp_path):
    tokens, folder = saved
    rounded = in_eight_bits(tokens.keys_values.bfloat16())
    assert (rounded - tokens.keys_values).abs().max() < 0.0625 * tokens.keys_values.abs().max()
    small = PromptTokens(tokens.embeddings, tokens.accuracy.tolist(), tokens.identity, prefix=rounded)
    small.save_pretrained(tmp_path / "small")
    saved_bytes = (folder / TENSORS).stat().st_size - (tmp_path / "small" / TENSORS).stat().st_size
    assert abs(saved_bytes - 3 * rounded.numel()) < 100  # the headers differ by some characters
    again = PromptTokens.from_pretrained(tmp_path / "small")
    assert again.keys_values.dtype == torch.bfloat16
    assert torch.equal(again.keys_values, rounded)
    by_peft = PromptTokens.from_pretrained(PeftModel.from_pretrained(tiny(), tmp_path / "small"))
    assert torch.equal(by_peft.keys_values, rounded.float())


def test_what_is_trained_is_of_eight_bits(tmp_path):
    base = tiny(dtype=torch.float32)
    mine = replies(base)
    made = train_prompt_tokens(base, mine, mine[:1], RECIPE, tmp_path)
    assert torch.equal(in_eight_bits(made.prefix), made.prefix)
    assert torch.isfinite(in_eight_bits(torch.tensor([1e9, -1e9]))).all()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prefix": None}, "promises None"),
        ({"prefix": [3, 2, 2, 9, 8]}, r"promises \[3, 2, 2, 9, 8\]"),
        ({"format_version": 1}, "in format 1"),
        ({"format_version": 3}, "this version reads those up to 2"),
    ],
)
def test_a_configuration_that_disagrees_with_the_prefix_is_refused(saved, changes, told):
    _, folder = saved
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=told):
        read_adapter(folder)


def test_peft_loads_a_prefix_and_saves_it_again(saved, tmp_path):
    tokens, folder = saved
    model = PeftModel.from_pretrained(tiny(), folder)
    live = PromptTokens.from_pretrained(model)
    assert torch.equal(live.keys_values, tokens.keys_values)
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    again = PromptTokens.from_pretrained(tmp_path / "peft")
    assert torch.equal(again.embeddings, tokens.embeddings)
    assert torch.equal(again.keys_values, tokens.keys_values)
    assert torch.equal(greedy(model, prompt()), greedy(tiny(), prompt()))
    assert TENSORS in {path.name for path in (tmp_path / "peft").iterdir()}


@pytest.mark.parametrize("name", ["ppd", "ppd_embeddings", "ppd_embeddings_prefix"])
def test_peft_makes_a_prefix_that_is_trained_beside_the_rows(name, tmp_path):
    model = get_peft_model(tiny(), PPDConfig(num_prompt_tokens=2, prefix=[3, 2, 2, 1, 8]), adapter_name=name)
    wanted = {key.rpartition(".")[0].rpartition(".")[2] for key, p in model.named_parameters() if p.requires_grad}
    assert wanted == {"ppd_embeddings", "ppd_embeddings_prefix"}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "ppd_embeddings" in key:
                parameter.normal_()
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PromptTokens.from_pretrained(tmp_path / name)
    assert torch.equal(again.keys_values, PromptTokens.from_pretrained(model).keys_values)


@pytest.mark.parametrize(
    "shape", [[3, 2, 2, 1], [3, 1, 2, 1, 8], [3, 2, 2, 0, 8], [3, 2, 2, 1, 2**40], "all", [3.0] * 5]
)
def test_a_configuration_of_no_prefix_is_refused(shape):
    with pytest.raises(ValueError, match="a prefix must be"):
        PPDConfig(prefix=shape)


def test_peft_reads_no_rows_without_the_prefix_that_belongs_to_them(saved):
    _, folder = saved
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "prefix": None}))
    with pytest.raises(ValueError, match="format_version is 2, that of rows with a prefix"):
        PeftModel.from_pretrained(tiny(), folder)
