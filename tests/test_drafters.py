"""The drafters that need no files, drafters by name, and the checks that all of them pass."""

import copy
import gc
import math
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from ppd_compose.integrations.lookup import PromptLookup, Text
from ppd_compose.integrations.medusa import MedusaHeads
from ppd_compose.integrations.recycling import Successors, TokenRecycling
from test_medusa import random_heads
from test_ngram import ngram_table
from tiny import FAMILIES, prompt, prompt_tokens, tiny

from ppd_compose import Budget, Step, TokenTree, compose, drafters, hookimpl, load_drafter, plugins
from ppd_compose.identity import Identity
from ppd_compose.prompt import PromptTokens
from ppd_compose.testing import DrafterFault, check_drafter, small_base

OURS = {
    "ppd": lambda base: prompt_tokens(),
    "lookup": lambda base: PromptLookup(),
    "recycling": lambda base: TokenRecycling(),
    "ngram": lambda base: ngram_table(),
}


@pytest.mark.parametrize("name", OURS)
def test_ours_pass_the_checks(name):
    check_drafter(OURS[name])


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "opt"])
@pytest.mark.parametrize("name", OURS)
def test_ours_pass_the_checks_on_other_families(name, family):
    check_drafter(OURS[name], tiny(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_without_files_together_give_the_tokens_of_generate(family):
    base = tiny(family, attention="eager")
    expected = base.generate(prompt(), max_new_tokens=50, do_sample=False)
    model = compose(base, PromptLookup(), TokenRecycling(), prompt_tokens(), budget=24)
    for _ in range(2):  # the second time with a table that is full
        assert torch.equal(model.generate(prompt(), max_new_tokens=50, do_sample=False), expected)
    assert model.stats.forwards < 50


def test_the_automaton_knows_every_repeated_ending():
    dice = random.Random(0)
    for _ in range(150):
        letters = [dice.randrange(3) for _ in range(dice.randrange(1, 40))]
        text = Text()
        for letter in letters:
            text.append(letter)
        match, size = text.link[text.last], len(letters)
        lengths = [n for n in range(1, size) if any(letters[i : i + n] == letters[-n:] for i in range(size - n))]
        longest = max(lengths, default=0)
        assert text.length[match] == longest
        if longest:
            ending = letters[-longest:]
            after = [letters[i + longest] for i in range(size - longest) if letters[i : i + longest] == ending]
            assert {token: text.seen[state] for token, state in text.next[match].items()} == {
                token: after.count(token) for token in after
            }


def test_lookup_guesses_what_followed_and_the_more_frequent_first():
    text = Text()
    for token in [1, 2, 3, 9, 1, 2, 3, 9, 1, 2, 4, 7, 1, 2]:
        text.append(token)
    found = list(text.continuations(6, 3, 1))
    assert [found[0][:2], found[1][:2]] == [(3, 0), (9, 1)]
    assert (4, 0) in [row[:2] for row in found]
    assert all(claim < 0 for _, _, claim in found)
    assert not list(Text().continuations(6, 3, 1))


def test_lookup_trusts_matches_that_kept_their_promise():
    kept, broken = Text(), Text()
    for token in [1, 2, 3] * 10:
        kept.judge(token)
        kept.append(token)
    dice = random.Random(1)
    for _ in range(30):
        token = dice.randrange(4)
        broken.judge(token)
        broken.append(token)
    claims = [max(claim for _, _, claim in text.continuations(4, 1, 1)) for text in (kept, broken)]
    assert claims[0] > claims[1]


def large_base():
    large = tiny()
    large.resize_token_embeddings(90, mean_resizing=False)
    with torch.no_grad():
        large.lm_head.weight[61:] = 1.5 * large.lm_head.weight[:29]  # so that it says those
    return large


def test_recycling_keeps_apart_what_two_bases_said():
    drafter, bases = TokenRecycling(), [large_base(), tiny(), tiny(seed=1)]

    def decode(base):
        model = compose(base, drafter, budget=8)
        return [model.generate(prompt(seed=seed), max_new_tokens=20, do_sample=False) for seed in range(4)]

    with ThreadPoolExecutor(3) as threads:
        for base, told in zip(bases, threads.map(decode, bases), strict=True):
            for seed, ids in enumerate(told):
                assert torch.equal(ids, base.generate(prompt(seed=seed), max_new_tokens=20, do_sample=False))
    said = [drafter.of[base.get_input_embeddings()] for base in bases]
    assert [len(each.tokens) for each in said] == [90, 61, 61]
    assert not np.array_equal(said[1].tokens, said[2].tokens)
    bases.clear()
    del base
    gc.collect()
    assert not drafter.of  # nor is a base held that is gone


def test_recycling_begins_anew_where_the_vocabulary_has_grown():
    drafter, base = TokenRecycling(), tiny()
    compose(base, drafter, budget=8).generate(prompt(), max_new_tokens=30, do_sample=False)
    base.resize_token_embeddings(90, mean_resizing=False)
    told = compose(base, drafter, budget=8).generate(prompt(), max_new_tokens=30, do_sample=False)
    assert torch.equal(told, base.generate(prompt(), max_new_tokens=30, do_sample=False))


@pytest.mark.parametrize("seed", range(5))
def test_recycling_reads_a_prompt_as_token_after_token(seed):
    dice = random.Random(seed)
    said, rows = Successors.nothing(9, 4), {}
    for length in (30, 1, 2, 12):
        ids = [dice.randrange(9) for _ in range(length)]
        said.read(ids)
        for token, following in pairwise(ids):
            row = rows.setdefault(token, [])
            rows[token] = [following, *(each for each in row if each != following)][:4]
    for token in range(9):
        assert said.tokens[token][said.chances[token] > 0].tolist() == rows.get(token, [])


def test_recycling_continues_guesses_that_claim_nothing():
    class Boasts:
        name = "boasts"

        @hookimpl
        def propose(self, step):
            return TokenTree.of([step.ids[-1], 3, 4], [-1, 0, 1], [0.0, -math.inf, -math.inf])

    class Takes:
        @hookimpl
        def merge(self, trees):
            return trees[-1]

    base = tiny()
    model = compose(base, Boasts(), TokenRecycling(), plugins=[Takes()], budget=16)
    expected = base.generate(prompt(), max_new_tokens=20, do_sample=False)
    assert torch.equal(model.generate(prompt(), max_new_tokens=20, do_sample=False), expected)


def test_recycling_keeps_what_the_model_said_and_continues_the_guesses_of_others():
    base = tiny()
    recycling = TokenRecycling(width=4)
    model = compose(base, recycling, budget=16)
    out = model.generate(prompt(), max_new_tokens=30, do_sample=False)[0]
    with torch.no_grad():
        logits = base(out[None]).logits[0]
    token = int(out[-3])
    last = int((out[:-2] == token).nonzero()[-1])
    (said,) = recycling.of.values()
    assert said.tokens[token].tolist() == logits[last].topk(4).indices.tolist()
    np.testing.assert_allclose(said.chances[token], logits[last].softmax(-1).topk(4).values, rtol=1e-6)
    tree = TokenTree.chain(int(out[0]), [token], [-0.1])
    grown = recycling._grown(said, tree, 8)
    assert grown.child(1, int(said.tokens[token][0])) is not None
    assert len(grown) <= len(tree) + 8
    recycling.reset()
    assert not recycling.of


@pytest.mark.parametrize(("asked", "read"), [({"recycling": 0.0}, {5, 1, 2, 3}), ({}, {5, 1})])
def test_recycling_that_is_not_asked_takes_up_accepted_rows_only(asked, read):
    recycling, step = TokenRecycling(width=4), Step([5], 61, Budget.flat(8), 10)
    recycling.start(step, tiny())
    tree = TokenTree.of([5, 1, 2, 3], [-1, 0, 0, 1], np.log([1.0, 0.5, 0.3, 0.2]))
    step.ids, step.tree, step.path, step.drafting = [5, 1, 7], tree, [0, 1], asked
    recycling.observe(step, torch.randn(4, 61, generator=torch.Generator().manual_seed(0)))
    assert set(np.flatnonzero(step.memory[recycling].chances.any(1)).tolist()) == read


@pytest.mark.parametrize(
    "make", [lambda: PromptLookup(size=0), lambda: TokenRecycling(width=0), lambda: TokenRecycling(least=1)]
)
def test_senseless_settings_are_refused(make):
    with pytest.raises(ValueError, match="got"):
        make()


class Bigrams:
    """What followed the last token before, as a user might write it."""

    name = "bigrams"

    @hookimpl
    def propose(self, step):
        ids = step.ids
        guesses = [b for a, b in pairwise(ids) if a == ids[-1]]
        return TokenTree.chain(ids[-1], guesses[-1:], [-0.5]) if guesses else None


def test_a_users_drafter_passes():
    check_drafter(lambda base: Bigrams())


class Leaves(Bigrams):
    """Leaves a mark on the base."""

    @hookimpl
    def start(self, model, step):
        for module in model.modules():
            module.visited = True


class Unrooted(Bigrams):
    @hookimpl
    def propose(self, step):
        return TokenTree.chain(0, [1], [-0.5])


class Silent(Bigrams):
    @hookimpl
    def propose(self, step):
        return None


class WantsTheWholeText(Bigrams):
    """Takes it that every token came with a hidden state."""

    @hookimpl
    def hidden_layers(self):
        return [0]

    @hookimpl
    def start(self, step):
        assert len(step.hidden_states[0]) == len(step.ids), "a state is missing"


class Breaks(Bigrams):
    @hookimpl
    def propose(self, step):
        raise IndexError("list index out of range")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Leaves, "'bigrams', check 'guesses_at_all': an attribute, hook, flag or weight of the base changed"),
        (Unrooted, "row 0 must be the root"),
        (Silent, "not one node or row in three generations"),
        (WantsTheWholeText, "'bigrams', check 'goes_on_from_a_cache': a state is missing"),
        (Breaks, "'bigrams', check 'guesses_at_all': IndexError: list index out of range"),
    ],
)
def test_a_drafter_that_is_wrong_fails_with_its_name_and_what_happened(kind, message):
    with pytest.raises(DrafterFault, match=message):
        check_drafter(lambda base: kind())


def test_drafters_by_name_and_folder(tmp_path):
    assert isinstance(load_drafter("lookup"), PromptLookup)
    assert isinstance(load_drafter("recycling"), TokenRecycling)
    assert load_drafter("ppd").embeddings.shape == (3, 1, 576)
    base = small_base()
    mine = prompt_tokens()
    mine.identity = Identity.of(base)
    mine.save_pretrained(tmp_path / "mine")
    assert isinstance(load_drafter(tmp_path / "mine"), PromptTokens)
    model = compose(base, "lookup", tmp_path / "mine", "recycling")
    assert list(model.plugins.drafters) == ["lookup", "ppd", "recycling"]


def test_a_folder_with_a_drafters_name_is_not_passed_by(tmp_path, monkeypatch):
    base, mine = small_base(), prompt_tokens()
    mine.identity = Identity.of(base)
    mine.save_pretrained(tmp_path / "ppd")
    monkeypatch.chdir(tmp_path)
    for source in ("./ppd", Path("ppd")):
        assert torch.equal(load_drafter(source).embeddings, mine.embeddings)
    with pytest.raises(ValueError, match=r"name of a drafter and a folder here: write './ppd'"):
        load_drafter("ppd")
    (tmp_path / "lookup").mkdir()  # of anything else
    assert isinstance(load_drafter("lookup"), PromptLookup)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Path("checkpoints/ppd"), "checkpoints/ppd is no folder"),
        ("draft-model", "'draft-model' needs files of its own"),
        ("", "'' is no drafter's name"),
        ("my drafts/of today", "of today.*no repository"),
        (r"C:\missing", "no folder and no Hub id"),
    ],
)
def test_what_cannot_be_a_source_is_told_before_anybody_is_asked(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=message):
        load_drafter(source)


def test_a_source_that_is_nothing_says_what_it_could_be(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'loookup' is no drafter's name \(.*lookup.*\), no folder and no Hub"):
        load_drafter("loookup")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"'notes.txt'.*which no installed kind of drafter knows: .*ppd"):
        load_drafter(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config.json holds list"):
        load_drafter(tmp_path)


def test_an_entry_point_that_fails_is_named_and_the_others_load(monkeypatch):
    class Point:
        name, value = "broken", "nowhere:Nothing"

        def load(self):
            raise ImportError("no module named nowhere")

    good = plugins.entry_points(group=plugins.DRAFTERS)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [Point(), *good])
    with pytest.warns(UserWarning, match="'broken' .nowhere:Nothing. .* no module named nowhere"):
        assert "ppd" in plugins.installed()


def test_a_kind_that_fails_to_recognise_a_folder_is_named_and_the_others_load(tmp_path, monkeypatch):
    class Mine:
        @staticmethod
        def recognises(config, files):
            return config["mine"]

    PromptTokens(prompt_tokens().embeddings, None, Identity.of(tiny())).save_pretrained(tmp_path)
    monkeypatch.setattr(drafters, "installed", lambda: {"mine": Mine, **plugins.installed()})
    with pytest.warns(UserWarning, match=r"the kind 'mine' of drafters .*Mine.* is left out: KeyError: 'mine'"):
        assert load_drafter(tmp_path).name == "ppd"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda drafter: pickle.loads(pickle.dumps(drafter))])
@pytest.mark.parametrize("name", ["ppd", "ngram", "lookup", "recycling", "medusa"])
def test_a_drafter_is_copied_and_pickled_with_its_settings_also_after_use(copied, name):
    base = tiny(dtype=torch.float32)
    made = {
        "ppd": prompt_tokens(), "ngram": ngram_table(), "lookup": PromptLookup(depth=3),
        "recycling": TokenRecycling(width=3), "medusa": MedusaHeads(random_heads()),
    }  # fmt: skip
    drafter = made[name]
    drafter.name = "mine"
    expected = base.generate(prompt(), max_new_tokens=12, do_sample=False)
    compose(base, drafter, budget=8).generate(prompt(), max_new_tokens=12, do_sample=False)
    again = copied(drafter)
    assert again.name == "mine"
    assert getattr(again, "settings", None) == getattr(drafter, "settings", None)
    assert torch.equal(compose(base, again, budget=8).generate(prompt(), max_new_tokens=12, do_sample=False), expected)
