"""What a benchmark says of two answers that differ, and which questions it takes."""

import pytest
from test_compose import tokenizer
from tiny import prompt, tiny

from ppd_compose.bench import Answered, divergence, questions_from
from ppd_compose.prompts import Prompt


def test_a_difference_is_told_with_its_place_and_the_gap_of_the_bases_logits():
    base = tiny()
    ids = base.generate(prompt(), max_new_tokens=10, do_sample=False)
    theirs = Answered("qa", 12, ids=ids[0].tolist())
    best = base(ids[:, :16]).logits[0, -1].detach().topk(2)
    mine = Answered("qa", 12, ids=[*theirs.ids[:16], int(best.indices[1]), *theirs.ids[17:]])
    told = divergence(base, mine, theirs)
    assert told["position"] == 4
    assert told["gap"] == pytest.approx(float(best.values[0] - best.values[1]), rel=1e-5)
    assert told["tokens"] == [[theirs.ids[16]], [mine.ids[16]]]
    assert divergence(base, theirs, theirs) is None


def test_an_answer_that_is_shorter_parts_where_it_ends():
    base = tiny()
    ids = base.generate(prompt(), max_new_tokens=10, do_sample=False)[0].tolist()
    told = divergence(base, Answered("qa", 12, ids=ids[:-3]), Answered("qa", 12, ids=ids))
    assert (told["position"], told["tokens"]) == (7, [[ids[19]], []])


def test_questions_are_spread_evenly_and_the_subjects_of_mt_bench_are_one_category():
    prompts = [Prompt((f"a{'b' * i}",), category) for i, category in enumerate(["writing"] * 4 + ["stem"] * 4 + ["qa"])]
    taken = questions_from(prompts, tokenizer(), 2)
    assert [(q.category, q.ids.shape[1]) for q in taken] == [("mt_bench", 1), ("mt_bench", 5), ("qa", 9)]
