"""N-gram tables: counting, smoothing, drafting, files and refusals."""

import json
import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
import typer
from ppd_compose.integrations.ngram import NGramTable, Table
from ppd_compose.integrations.ngram.command import command
from ppd_compose.integrations.ngram.train import NGramRecipe, counted_table, counts, evaluate, train_ngram
from test_compose import tokenizer
from tiny import VOCAB, prompt, tiny
from typer.testing import CliRunner

from ppd_compose import compose, compose_from_pretrained, load_drafter
from ppd_compose.budget import Budget
from ppd_compose.identity import Identity
from ppd_compose.prompts import Prompt
from ppd_compose.replies import Reply
from ppd_compose.step import Step


def table(seed=0):
    """Three likely successors of every token, and others after some pairs."""
    dice = random.Random(seed)
    following = {(token,): dict.fromkeys(dice.sample(range(VOCAB), 3), 0.25) for token in range(VOCAB)}
    for _ in range(40):
        following[dice.randrange(VOCAB), dice.randrange(VOCAB)] = {dice.randrange(VOCAB): 0.75}
    return Table.of(following, 2)


def ngram_table(**settings):
    return NGramTable(table(), **settings)


def step(*ids, rows=64):
    return Step(list(ids), VOCAB, Budget.flat(rows), 100)


def paths(tree):
    """Claimed chance by path below the root."""
    found = {0: ()}
    for node, parent in enumerate(tree.parents.tolist()[1:], 1):
        found[node] = (*found[parent], int(tree.tokens[node]))
    return {found[node]: math.exp(tree.log_probs[node]) for node in range(1, len(tree))}


def test_replies_are_counted_and_not_occurrences():
    dice = random.Random(0)
    replies = [
        Reply([dice.randrange(4) for _ in range(5)], [dice.randrange(4) for _ in range(dice.randrange(1, 12))])
        for _ in range(30)
    ]
    for length, found in enumerate(counts(replies, 3), 1):
        expected = {}
        for reply in replies:
            ids, said = reply.ids, set()
            for at in range(len(reply.prompt), len(ids)):
                said.add((tuple(ids[at - length : at]), ids[at]))
            for context, token in said:
                expected.setdefault(context, {}).setdefault(token, 0)
                expected[context][token] += 1
        assert found == expected


def test_a_reply_longer_than_its_prompt_is_counted_from_its_second_token_on():
    assert counts([Reply([], [7, 8])], 2)[0] == {(7,): {8: 1}}


def test_chances_are_those_of_witten_and_bell():
    replies = [Reply([1], [2, 3]), Reply([1], [2, 4]), Reply([5], [2, 3])]
    made = counted_table(replies, NGramRecipe(order=2))
    # After 2: three replies, two kinds. After 1, 2: two replies, two kinds, the rest left to what follows 2.
    shorter = {3: Fraction(2, 5), 4: Fraction(1, 5)}
    longer = {token: Fraction(1, 4) + Fraction(2, 4) * shorter[token] for token in (3, 4)}
    assert {token: pytest.approx(math.exp(claim)) for token, claim in made.after([2])} == shorter
    assert {token: pytest.approx(math.exp(claim)) for token, claim in made.after([1, 2])} == longer
    assert made.after([5, 2]) == made.after([2])  # said once only
    assert made.after([3]) == []


def test_few_and_likely_tokens_are_kept():
    replies = [Reply([1], [2 + n % 9]) for n in range(90)]
    made = counted_table([*replies, Reply([1], [2])], NGramRecipe(order=1, width=4))
    assert [token for token, _ in made.after([1])] == [2, 3, 4, 5]
    with pytest.raises(ValueError, match="say nothing twice"):
        counted_table([Reply([1], [2]), Reply([3], [4])], NGramRecipe())


def test_accuracy_is_by_rank():
    made = Table.of({(1,): {2: 0.6, 3: 0.3}}, 1)
    told = evaluate(made, [Reply([1], [2, 1]), Reply([0, 1], [3]), Reply([1], [9])])
    assert told == [0.25, 0.25, 0, 0, 0, 0, 0, 0]


def test_the_likeliest_continuations_are_drafted():
    made = Table.of({(1,): {2: 0.5, 3: 0.4}, (2,): {1: 0.9}, (1, 2): {4: 0.8}, (9, 1): {5: 0.7}}, 2)
    drafted = NGramTable(made, size=3).propose(step(0, 1))
    assert paths(drafted) == pytest.approx({(2,): 0.5, (3,): 0.4, (2, 4): 0.4})
    assert paths(NGramTable(made).propose(step(9, 1))) == pytest.approx({(5,): 0.7})
    assert paths(NGramTable(made, depth=1).propose(step(1))) == pytest.approx({(2,): 0.5, (3,): 0.4})
    assert len(NGramTable(made).propose(step(1, rows=2))) == 2
    assert NGramTable(made).propose(step(7)) is None


def test_what_the_table_knows_is_accepted():
    base = tiny()
    expected = base.generate(prompt(), max_new_tokens=40, do_sample=False)
    reply = Reply(prompt()[0].tolist(), expected[0, prompt().shape[1] :].tolist())
    model = compose(base, NGramTable(counted_table([reply, reply], NGramRecipe(order=4))), budget=16)
    assert torch.equal(model.generate(prompt(), max_new_tokens=40, do_sample=False), expected)
    assert model.stats.forwards < 20


def test_the_tables_index_is_made_before_decoding():
    drafter = ngram_table()
    compose(tiny(), drafter, budget=8)
    assert "_known" in vars(drafter.table)


def test_what_is_saved_is_read(tmp_path):
    made = ngram_table(size=5, depth=3, accuracy=[0.5, 0.25], identity=Identity.of(tiny()), training={"order": 2})
    made.save_pretrained(tmp_path / "one")
    again = load_drafter(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    assert (tmp_path / "one" / "ngram.safetensors").read_bytes() == (
        tmp_path / "two" / "ngram.safetensors"
    ).read_bytes()
    assert (again.identity, again.accuracy, again.training) == (made.identity, made.accuracy, made.training)
    for name in ("contexts", "starts", "tokens", "chances"):
        np.testing.assert_array_equal(getattr(again.table, name), getattr(made.table, name))
    compose(tiny(), made, "lookup", budget=8).save_composition(tmp_path / "whole")
    drafter = compose_from_pretrained(tmp_path / "whole", tiny()).plugins.drafters["ngram"]
    assert (drafter.size, drafter.depth) == (5, 3)


def test_folders_without_a_table(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ngram\.safetensors is missing"):
        NGramTable.from_pretrained(tmp_path)
    ngram_table().save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**told, "ppd_compose": {"format": 7}}))
    with pytest.raises(ValueError, match="is not of format 1, which this version reads"):
        NGramTable.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contexts": np.zeros(3, np.int64)}, "contexts of 1 to 16 tokens"),
        ({"starts": np.array([0, 1])}, "need one start more"),
        ({"starts": np.array([0, 2, 1, 3])}, "must rise from 0"),
        ({"tokens": np.array([1, -2, 3])}, "are no tokens"),
        ({"chances": np.array([0.5, np.nan, 0.5])}, "above 0 and at most at 1"),
        ({"chances": np.array([0.6, 0.6, 0.5])}, r"add up to 1\.200"),
    ],
)
def test_arrays_that_are_no_table(change, message):
    whole = {
        "contexts": np.array([[1], [2], [3]]), "starts": np.array([0, 2, 3, 3]), "tokens": np.array([1, 2, 3]),
        "chances": np.array([0.5, 0.5, 0.5]),
    }  # fmt: skip
    Table(**whole)
    with pytest.raises(ValueError, match=message):
        Table(**{**whole, **change})


@pytest.mark.parametrize("settings", [{"size": 0}, {"depth": 0}, {"accuracy": [1.5]}, {"accuracy": [math.nan]}])
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ValueError, match=r"at least 1|between 0 and 1"):
        ngram_table(**settings)


@pytest.mark.parametrize("settings", [{"order": 0}, {"order": 17}, {"width": 0}, {"least": 0.0}])
def test_a_recipe_that_makes_no_sense(settings):
    with pytest.raises(ValueError, match="need an order"):
        NGramRecipe(**settings)


def test_a_table_for_another_base():
    wide = NGramTable(Table.of({(VOCAB,): {1: 0.5}}, 1), identity=Identity("other/base", 32, 99, "x"))
    with pytest.raises(ValueError, match=f"names token {VOCAB}; it cannot be used on .* as other/base"):
        compose(tiny(), wide, budget=8)
    with pytest.warns(UserWarning, match="fewer guesses may be right"):
        compose(tiny(), ngram_table(identity=Identity("other/base", 64, VOCAB, "x")), budget=8)


def test_a_whole_training_writes_a_table_that_loads(tmp_path):
    base = tiny(dtype=torch.float32, eos=60)
    asked = [Prompt((f"{c}abcdefg",)) for c in "hijklmno"]
    for name in ("one", "two"):
        made = train_ngram(
            base, tokenizer(), asked, tmp_path / name, NGramRecipe(order=1), base_name="me/base", held_out=1,
            reply_tokens=24,
        )  # fmt: skip
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["README.md", "config.json", "ngram.safetensors"]
    assert (tmp_path / "one" / files[2]).read_bytes() == (tmp_path / "two" / files[2]).read_bytes()
    again = load_drafter(tmp_path / "one")
    assert len(again.table.tokens) == len(made.table.tokens) > 0
    assert again.identity.name == "me/base"
    expected = base.generate(prompt(), max_new_tokens=20, do_sample=False)
    assert torch.equal(compose(base, again, budget=16).generate(prompt(), max_new_tokens=20, do_sample=False), expected)


def test_the_command_counts_and_writes_a_card(tmp_path):
    base = tiny(dtype=torch.float32, eos=60)
    base.generation_config.max_length = None
    base.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"{c}abcdef"}) for c in "hijklmno"))
    app = typer.Typer()
    app.command()(command)
    words = [
        "--base", tmp_path / "base", "--dtype", "float32", "--prompts", tmp_path / "prompts.jsonl",
        "--out", tmp_path / "out", "--order", 1, "--reply-tokens", 24, "--held-out", 1,
    ]  # fmt: skip
    told = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert told.exit_code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith('---\nbase_model: "base"\n')
    assert "| distance | top 1 | top 2 | top 3 | top 5 |" in card
    assert str(tmp_path) not in card + (tmp_path / "out" / "config.json").read_text()
