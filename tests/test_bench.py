"""What a benchmark says of two answers that differ, and which questions it takes."""

import json
import re
from dataclasses import replace
from functools import partial
from io import StringIO

import numpy as np
import pytest
import torch
from ppd_compose.integrations.recycling import TokenRecycling
from rich.console import Console
from test_compose import tokenizer
from tiny import prompt, tiny

from ppd_compose import bench_job, compose
from ppd_compose.bench import Answered, Protocol, WithSettings, best_two, divergence, greedy, joined, summarise
from ppd_compose.bench_job import bench, composed
from ppd_compose.loading import LoadedBase
from ppd_compose.packed import can_pack
from ppd_compose.prompts import Prompt, encode
from ppd_compose.questions import Question, questions_from
from ppd_compose.stats import Stats


def test_a_difference_is_told_with_its_place_and_the_gap_of_the_bases_logits():
    base = tiny()
    ids = base.generate(prompt(), max_new_tokens=10, do_sample=False)
    theirs = Answered("qa", 12, ids=ids[0].tolist())
    best = base(ids[:, :16]).logits[0, -1].detach().topk(2)
    mine = Answered("qa", 12, ids=[*theirs.ids[:16], int(best.indices[1]), *theirs.ids[17:]])
    told = divergence(mine, theirs, partial(best_two, base, theirs))
    assert told["position"] == 4
    assert told["gap"] == pytest.approx(float(best.values[0] - best.values[1]), rel=1e-5)
    assert told["tokens"] == [[theirs.ids[16]], [mine.ids[16]]]
    assert divergence(theirs, theirs, lambda: pytest.fail("nothing to ask")) is None


def test_an_answer_that_is_shorter_parts_where_it_ends():
    base = tiny()
    ids = base.generate(prompt(), max_new_tokens=10, do_sample=False)[0].tolist()
    theirs = Answered("qa", 12, ids=ids)
    told = divergence(Answered("qa", 12, ids=ids[:-3]), theirs, partial(best_two, base, theirs))
    assert (told["position"], told["tokens"]) == (7, [[ids[19]], []])


def test_what_drafters_can_change_is_told_apart_from_the_prefill():
    stats = Stats(forwards=5, tokens=9)
    stats.seconds["prefill"] = 0.5
    mine, theirs = Answered("qa", 1, [2.0, 1.5], list(range(10)), stats), Answered("qa", 1, [3.0, 3.0], list(range(10)))
    assert summarise("mine", [mine], [theirs])["tokens_per_second_after_prefill"] == 9 / (1.5 - 0.5)
    assert summarise("theirs", [theirs], [theirs])["tokens_per_second_after_prefill"] == 0


def test_expectations_are_told_with_what_chance_alone_would_move_them_by():
    def told(pairs):
        mine = [Answered("qa", 1, [1.0], [0, 1], Stats(forwards=9, tokens=n, expected=e)) for e, n in pairs]
        return summarise("mine", mine, [Answered("qa", 1, [1.0], [0, 1])] * len(mine))

    each = told([(11.0, 10), (22.0, 20)])
    assert each["expected_over_found"] == pytest.approx(1.1)
    assert each["expected_over_found_error"] == pytest.approx(0.0, abs=1e-12)
    dice = np.random.default_rng(0)
    drawn = [told([(20.0, int(dice.poisson(20))) for _ in range(30)]) for _ in range(400)]
    spread = np.std([each["expected_over_found"] for each in drawn])
    assert np.mean([each["expected_over_found_error"] for each in drawn]) == pytest.approx(spread, rel=0.1)
    assert "expected_over_found" not in told([(11.0, 10)])


def test_tokens_and_seconds_of_rounds_whose_answers_differ():
    rounds = [Answered("qa", 1, [seconds], list(range(1 + n))) for seconds, n in ((2.0, 10), (4.0, 30), (1.0, 2))]
    mine, base = joined(rounds), Answered("qa", 1, [2.0, 2.0, 2.0], list(range(11)))
    told = summarise("mine", [mine], [base])
    assert told["tokens_per_second"] == 10 / 2.0  # medians, each of all rounds
    assert told["speedup_by_round"] == [1.0, 1.5, 0.4]


def test_questions_are_spread_evenly_and_the_subjects_of_mt_bench_are_one_category():
    prompts = [Prompt((f"a{'b' * i}",), category) for i, category in enumerate(["writing"] * 4 + ["stem"] * 4 + ["qa"])]
    taken = questions_from(prompts, tokenizer(), 2)
    assert [(q.category, q.ids.shape[1]) for q in taken] == [("mt_bench", 1), ("mt_bench", 5), ("qa", 9)]


class CutOff(Exception):
    """As if the process were killed there."""


class Slowly:
    """A contender that breaks off after some answers."""

    def __init__(self, base, answers=None):
        self.base, self.device, self.left, self.asked = base, base.device, answers, 0

    def generate(self, ids, **settings):
        if self.left is not None and self.asked >= self.left:
            raise CutOff
        self.asked += 1
        return self.base.generate(ids, **settings)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_benchmark_that_is_cut_off_goes_on_where_it_stopped(tmp_path, temperature):
    base = tiny()
    loaded = LoadedBase(base, tokenizer(), "tiny", "here")
    protocol = Protocol([Question(prompt(seed=i), "qa") for i in range(4)], 2, 8, temperature)
    console, out, kept = Console(quiet=True), tmp_path / "result.json", tmp_path / "result.json.part"

    def go(contender, temperature=temperature):
        def contenders():
            return {"slow": contender, "recycling": compose(base, "recycling", budget=8)}

        return bench(loaded, contenders, replace(protocol, temperature=temperature), "command", console, out)

    with pytest.raises(CutOff):
        go(Slowly(base, answers=1 + 4 + 1 + 2))  # a round of four, one of two, and one to warm up before each
    with kept.open("a") as file:
        file.write('{"round": 1, "question": 3, "ans')
    again = Slowly(base)
    result = go(again)
    assert again.asked == 1 + 2
    assert not kept.exists()
    assert json.loads(out.read_text())["protocol"]["temperature"] == temperature
    for run in result["runs"]:
        assert run["questions"] == 4
        assert run["identical"] == 4
        assert len(run["speedup_by_round"]) == 2
    assert result["runs"][1]["tokens_per_forward"] > 0
    assert list(result["runs"][1]["acceptance"]) == ["recycling"]
    assert result["runs"][0]["reliability"] == []
    assert all(0 <= tenth["right"] <= 1 and tenth["guesses"] > 0 for tenth in result["runs"][1]["reliability"])


def test_a_question_on_which_several_part_from_the_base_is_computed_once(monkeypatch):
    base, asked = tiny(), []
    loaded = LoadedBase(base, tokenizer(), "tiny", "here")
    questions = [Question(prompt(seed=i), "qa") for i in range(2)]
    monkeypatch.setattr(bench_job, "best_two", lambda *told: asked.append(told) or best_two(*told))
    others = {"second": tiny(seed=1), "third": tiny(seed=2)}
    runs = bench(loaded, lambda: others, Protocol(questions, 1, 8), "command", Console(quiet=True))["runs"]
    assert [len(run["divergences"]) for run in runs] == [2, 2]
    assert len(asked) == 2


def test_what_learns_while_it_decodes_knows_no_answer_from_the_round_before():
    base = tiny()
    loaded, questions = (
        LoadedBase(base, tokenizer(), "tiny", "here"),
        [Question(prompt(seed=i), "qa") for i in range(3)],
    )

    def contenders():
        return {"recycling": compose(base, "recycling", budget=8)}

    once, thrice = (
        bench(loaded, contenders, Protocol(questions, rounds, 24), "command", Console(quiet=True))["runs"][0]
        for rounds in (1, 3)
    )
    assert len(thrice["speedup_by_round"]) == 3
    assert thrice["tokens_per_forward"] == once["tokens_per_forward"]
    assert thrice["acceptance"] == once["acceptance"]


def test_compositions_of_one_listing_share_no_drafter():
    loaded = LoadedBase(tiny(dtype=torch.float32), tokenizer(), "tiny", "here")
    ways = ["eager", "packed"] if can_pack(loaded.model) else ["eager"]
    made = composed(loaded, {"recycling": lambda: [TokenRecycling()]}, ways, 8, Console(quiet=True))
    drafters = [model.plugins.drafters["recycling"] for model in made.values()]
    assert len(set(drafters)) == len(ways)


def test_a_base_that_is_set_to_return_more_than_tokens_is_asked_all_the_same():
    base = tiny()
    expected = greedy(base, prompt(), 8)
    base.generation_config.return_dict_in_generate = True
    assert greedy(base, prompt(), 8) == expected
    assert len(expected) == 20


def test_another_benchmark_does_not_take_up_what_one_left(tmp_path):
    base = tiny()
    loaded, out = LoadedBase(base, tokenizer(), "tiny", "here"), tmp_path / "result.json"
    protocol, kept = Protocol([Question(prompt(seed=i), "qa") for i in range(2)], 1, 8), tmp_path / "result.json.part"
    with pytest.raises(CutOff):
        bench(loaded, lambda: {"slow": Slowly(base, answers=2)}, protocol, "command", Console(quiet=True), out)
    before = kept.read_bytes()
    for name, command, what in (("slow", "another", "command"), ("fast", "command", "contenders")):
        with pytest.raises(ValueError, match=rf"answered so far \({what} differ\).*begin anew"):
            bench(loaded, partial(dict, **{name: Slowly(base)}), protocol, command, Console(quiet=True), out)
        assert kept.read_bytes() == before
    with torch.no_grad():
        base.lm_head.weight += 1  # the input embeddings are as they were
    with pytest.raises(ValueError, match=r"answered so far \(weights differ\)"):
        bench(loaded, lambda: {"slow": Slowly(base)}, protocol, "command", Console(quiet=True), out)
    assert kept.read_bytes() == before
    kept.write_text("{\n" + "x\n")
    with pytest.raises(ValueError, match=r"result.json.part is damaged"):
        bench(loaded, lambda: {"slow": Slowly(base)}, protocol, "command", Console(quiet=True), out)


def test_later_turns_are_made_when_nothing_is_left_to_refuse_and_are_those_of_the_answers_that_are_kept(tmp_path):
    base = tiny()
    loaded, out = LoadedBase(base, tokenizer(), "tiny", "here"), tmp_path / "result.json"
    first, second, other = (Question(prompt(seed=seed), "qa") for seed in range(3))

    def go(contender, later, into=out):
        protocol = Protocol([first], 1, 8, all_turns=True)
        return bench(loaded, lambda: {"slow": contender}, protocol, "command", Console(quiet=True), into, later=later)

    with pytest.raises(ValueError, match="is a folder"):
        go(Slowly(base), lambda: pytest.fail("answered in vain"), tmp_path)
    with pytest.raises(CutOff):
        go(Slowly(base, answers=1 + 2), lambda: [first, second, second])
    for others in ([first, other, second], [first]):
        with pytest.raises(ValueError, match=r"result.json.part holds an answer to another question.*begin anew"):
            go(Slowly(base), partial(list, others))
    again = Slowly(base)
    assert go(again, lambda: [first, second, second])["runs"][0]["questions"] == 3
    assert again.asked == 1 + 1


def test_later_turns_follow_the_answers_to_those_before():
    words = tokenizer()
    told = []

    def answer(ids):
        told.append(ids)
        return [*ids[0].tolist(), 5, 6]

    prompts = [Prompt(("ab", "cd", "ef"), "writing"), Prompt(("gh",), "qa")]
    asked = questions_from(prompts, words, None, answer)
    assert [question.category for question in asked] == ["mt_bench"] * 3 + ["qa"]
    assert len(told) == 2  # what follows the last turn is asked of the contenders only
    said = words.decode([5, 6])
    assert asked[1].ids[0].tolist() == encode(words, "ab", said, "cd")
    assert asked[2].ids[0].tolist() == encode(words, "ab", said, "cd", said, "ef")
    assert len(questions_from(prompts, words, None)) == 2


def test_what_cannot_be_asked_or_written_is_told_before_anything_is_run(tmp_path):
    loaded = LoadedBase(tiny(), tokenizer(), "tiny", "here")
    for questions, out, message in (([], None, "no question"), ([Question(prompt(), "qa")], tmp_path, "is a folder")):
        with pytest.raises(ValueError, match=message):
            bench(loaded, lambda: pytest.fail("made"), Protocol(questions, 1, 8, 0.0), "", Console(quiet=True), out)
    assert not list(tmp_path.iterdir())


CATEGORIES = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "[rag]:b:")
LONG = "medusa+ppd+ngram+recycling+exp[lr]+exp[/1] packed"


def table(width, **console):
    """The lines of the table of a benchmark of many categories and a long listing."""
    base, out = tiny(), StringIO()
    questions = [Question(prompt(), category) for category in CATEGORIES]
    loaded = LoadedBase(base, tokenizer(), "tiny", "here")
    shown = Console(file=out, width=width, **console)
    bench(loaded, lambda: {LONG: WithSettings(base, {})}, Protocol(questions, 1, 4), "command", shown)
    lines = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", out.getvalue()).splitlines()
    return lines[next(number for number, line in enumerate(lines) if "float64" in line) :]


def test_a_table_in_a_file_is_as_wide_as_it_needs():
    told = table(80)
    assert {*CATEGORIES, "all", "tokens/forward", "identical"} <= set(re.split(r"\s*[┃│]\s*", told[2]))
    [row] = [line for line in told if LONG in line]
    assert "6/6" in row
    assert row.count("x ") == 7


def test_a_table_on_a_narrow_terminal_is_folded_and_nothing_is_cut():
    told = table(80, force_terminal=True)
    assert max(map(len, told)) <= 80
    assert "…" not in "".join(told)
    first = next(number for number, line in enumerate(told) if line.strip().startswith("medusa"))
    assert "6/6" in told[first].split()
    assert sum(word.endswith("x") for word in told[first].split()[1:]) == 7
    assert "".join("".join(line.split()[:1]) for line in told[first:]).startswith(LONG.split()[0])


def test_the_files_of_drafters_are_watched_in_folders_with_spaces_too(tmp_path):
    (tmp_path / "my adapter").mkdir()
    (tmp_path / "my adapter" / "config.json").touch()
    assert [name for name, _ in bench_job._files(f"lookup+{tmp_path}/my adapter packed")] == ["config.json"]
