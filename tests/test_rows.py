"""Rows and drafters are bought only where they pay, and get another chance."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import Oracle, array, prompt, prompt_tokens, tiny

from ppd_compose import Appended, Budget, Step, TokenTree, compose, drafting, hookimpl
from ppd_compose.asking import TIMED, TRIED, Asked
from ppd_compose.rows import BestRows
from ppd_compose.tree import union
from ppd_compose.worth import added

STEEP = Budget((1, 64), (0,), ((1.0, 1.0 + 63 * 0.1),))


def test_prompt_tokens_that_break_their_promises_are_bought_less_often_and_not_never():
    rows = []

    class Counts:
        @hookimpl
        def observe(self, step):
            rows.append(step.rows)

    model = compose(tiny(), prompt_tokens(), budget=STEEP, plugins=[Counts()])  # random ones: every guess is wrong
    for _ in range(3):
        model.generate(prompt(), max_new_tokens=140, do_sample=False)
    assert sum(rows[1:11]) > 1.5 * sum(rows[-10:])
    later = rows[len(rows) // 2 :]
    assert any(count > 1 for count in later)
    assert sum(later) / len(later) < 3


class Rides:
    """Appends a row below each node, and below which it was accepted proposes what `answer` says next, if `good`."""

    def __init__(self, name, model, answer, good):
        self.name, self.answer, self.good = name, answer, good
        self.embedding = model.get_input_embeddings().weight[:1].detach()
        self.rode = 0

    @hookimpl
    def propose(self, step):
        told = step.answers.get(self)
        if told is None or not len(told.kinds):
            return None
        self.rode += 1
        token = self.answer[len(step.ids)] if len(step.ids) < len(self.answer) else 0
        return TokenTree.chain(step.ids[-1], [token if self.good else (token + 1) % 61], [-0.4])

    @hookimpl
    def append(self, tree):
        nodes = np.arange(len(tree))
        return Appended(self.embedding, 0 * nodes, nodes, nodes, 0.5 * tree.stop_chances())


def test_of_two_that_append_rows_the_one_that_keeps_its_promises_rides_along():
    base = tiny()
    answer = base.generate(prompt(), max_new_tokens=140, do_sample=False)
    good, bad = (Rides(name, base, answer[0].tolist(), name == "good") for name in ("good", "bad"))
    # A root, a guess and one row; with more room forwards of four rows would carry the bad one for nothing.
    model = compose(base, good, bad, budget=Budget((1, 3), (0,), ((1.0, 1.2),)))
    for _ in range(3):
        assert model.generate(prompt(), max_new_tokens=140, do_sample=False).tolist() == answer.tolist()
    assert good.rode > 2 * bad.rode > 0


def test_a_drafter_that_does_not_pay_takes_a_hundredth_of_the_time_until_it_pays():
    asked, told = Asked(), {"seconds": 0.1, "rate": 10.0, "forward": 0.2}
    for _ in range(TIMED):
        assert asked.turn()
        asked.judge(gained=0.2, **told)
    turns = 0
    for _ in range(500):
        if asked.turn():
            turns += 1
            asked.judge(gained=0.2, **told)
    assert turns * 0.1 <= 0.011 * 500 * 0.2 < (turns + 2) * 0.1
    while not asked.turn():
        pass
    for _ in range(20):
        asked.judge(gained=3.0, **told)
    assert asked.turn()
    assert asked.turn()


def test_a_drafter_is_judged_by_what_it_takes_once_it_is_under_way():
    asked = Asked()
    for number in range(TIMED):
        assert asked.turn()
        asked.judge(seconds=0.1 if number < TRIED else 0.01, gained=0.2, rate=10.0, forward=0.2)
    assert asked.typical == 0.01
    assert asked.turn()
    assert asked.turn()


def test_a_drafter_that_gained_nothing_need_not_be_timed_further_until_it_does():
    asked, told = Asked(), {"seconds": 0.01, "rate": 10.0, "forward": 0.02}
    asked.judge(seconds=1.0, gained=0.0, rate=10.0, forward=0.02)  # the first time much is made ready
    for _ in range(TRIED - 1):
        assert asked.turn()
        asked.judge(gained=0.0, **told)
    assert sum(not asked.turn() for _ in range(45)) == 45
    assert any(asked.turn() for _ in range(10))
    asked.judge(gained=2.0, **told)
    assert asked.turn()


def test_a_quick_drafter_is_always_asked():
    asked = Asked()
    for _ in range(50):
        assert asked.turn()
        asked.judge(seconds=0.001, gained=0.0, rate=10.0, forward=0.2)


@pytest.fixture
def clock(monkeypatch):
    """What drafters are timed by: it stands still but for the seconds that they say they take."""
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(drafting, "time", clock)
    return clock


class Slow:
    """Guesses what never comes, and takes its time."""

    name = "slow"

    def __init__(self, clock):
        self.asked, self.clock = 0, clock

    @hookimpl
    def propose(self, step):
        self.asked += 1
        self.clock.now += 0.01
        return TokenTree.chain(step.ids[-1], [0], [-1.0])


def test_a_slow_drafter_that_adds_nothing_is_asked_seldom(clock):
    base, slow = tiny(), Slow(clock)
    answer = base.generate(prompt(), max_new_tokens=100, do_sample=False)
    budget = Budget((1, 64), (0,), ((0.01, 0.02),))
    model = compose(base, Oracle(answer[0].tolist(), depth=1), slow, budget=budget)
    assert model.generate(prompt(), max_new_tokens=100, do_sample=False).tolist() == answer.tolist()
    assert slow.asked < model.stats.forwards / 2


def test_the_time_in_which_a_drafter_takes_up_a_step_counts_as_its_own(clock):
    class SlowToLearn(Slow):
        @hookimpl
        def propose(self, step):
            self.asked += 1
            return TokenTree.chain(step.ids[-1], [0], [-1.0])

        @hookimpl
        def observe(self, step):
            self.clock.now += 0.01

    base, slow = tiny(), SlowToLearn(clock)
    model = compose(base, slow, budget=Budget((1, 64), (0,), ((0.01, 0.02),)))
    model.generate(prompt(), max_new_tokens=100, do_sample=False)
    assert slow.asked < model.stats.forwards / 2
    assert "observe slow" in model.stats.seconds


def test_many_slow_drafters_that_add_nothing_take_no_more_together_than_one(clock):
    base, slow = tiny(), []
    for name in "abcde":
        slow.append(Slow(clock))
        slow[-1].name = name
    model = compose(base, *slow, budget=Budget((1, 64), (0,), ((0.01, 0.64),)))
    for _ in range(2):
        model.generate(prompt(), max_new_tokens=100, do_sample=False)
    before, forwards = sum(each.asked for each in slow), 0
    for _ in range(8):
        model.generate(prompt(), max_new_tokens=100, do_sample=False)
        forwards += model.stats.forwards
    assert (sum(each.asked for each in slow) - before) * 0.01 < 0.02 * forwards * 0.01


@pytest.mark.parametrize("drafter", ["oracle", "slow"])
def test_with_rows_that_cost_nothing_everyone_is_asked(drafter, clock):
    base, slow = tiny(), Slow(clock)
    answer = base.generate(prompt(), max_new_tokens=20, do_sample=False)
    oracle = Oracle(answer[0].tolist())
    model = compose(base, oracle, slow, budget=16)
    model.generate(prompt(), max_new_tokens=20, do_sample=False)
    assert set(model.stats.candidates) == {"oracle", "slow"}
    assert slow.asked == model.stats.forwards - 1


def test_two_who_guess_the_same_are_not_both_put_to_rest(clock):
    """What each adds shows when the other is not asked."""
    base, turns = tiny(), []
    answer = base.generate(prompt(), max_new_tokens=140, do_sample=False)

    class Knows(Slow):
        def __init__(self, name):
            super().__init__(clock)
            self.name = name

        @hookimpl
        def propose(self, step):
            self.clock.now += 0.002
            turns.append(self.name)
            ahead = answer[0].tolist()[len(step.ids) : len(step.ids) + 1]
            return TokenTree.chain(step.ids[-1], ahead, [-0.1] * len(ahead))

    model = compose(base, Knows("one"), Knows("other"), budget=Budget((1, 64), (0,), ((0.02, 0.03),)))
    for _ in range(4):
        assert model.generate(prompt(), max_new_tokens=140, do_sample=False).tolist() == answer.tolist()
    assert model.stats.tokens_per_forward > 1.4
    assert len(turns) > 100


def test_what_others_hang_below_a_guess_counts_for_it():
    tree = TokenTree.of([5, 1, 2, 3], [-1, 0, 1, 2], np.log([1.0, 0.6, 0.5, 0.4]))
    tree = replace(tree, sources=array(0, 1, 2, 2))
    step = Step([5], 61, Budget.flat(8), 10, drafters=("one", "other"))
    gained = added(step, tree, 0.05 * np.arange(1, 9))
    assert gained == pytest.approx([0.6 + 0.5 + 0.4 - 0.15, 0.5 + 0.4 - 0.1])


def test_a_fit_that_decides_now_and_then_does_not_confuse_the_default():
    class Sometimes:
        @hookimpl
        def fit(self, step, tree, appended):
            return (tree, appended) if step.index % 3 == 0 else None

    base = tiny()
    answer = base.generate(prompt(), max_new_tokens=100, do_sample=False)
    drafters = [prompt_tokens(), Oracle(answer[0].tolist())]
    model = compose(base, *drafters, budget=Budget((1, 8), (0,), ((0.01, 0.02),)), plugins=[Sometimes()])
    assert model.generate(prompt(), max_new_tokens=100, do_sample=False).tolist() == answer.tolist()


def test_an_answer_begins_at_the_pace_of_the_one_before():
    """Where guesses come true a second is worth more, and a faint guess is not worth its row: known from the start."""
    base, rows, rates = tiny(), [], []
    answer = base.generate(prompt(), max_new_tokens=60, do_sample=False)

    class Fan(Oracle):
        @hookimpl
        def propose(self, step):
            rates.append((step.index, step.rate))
            faint = [TokenTree.chain(step.ids[-1], [token], [np.log(0.05)]) for token in range(30)]
            return union([super().propose(step), *faint])

        @hookimpl
        def merge(self, trees):
            return union(trees)

        @hookimpl
        def observe(self, step):
            rows.append((step.index, step.rows))

    model = compose(base, Fan(answer[0].tolist()), budget=Budget((1, 64), (0,), ((1.0, 1.0 + 63 * 0.03),)))
    for _ in range(2):
        assert model.generate(prompt(), max_new_tokens=60, do_sample=False).tolist() == answer.tolist()
    first, second = (rows_of_step for index, rows_of_step in rows if index == 2)
    assert first > 20
    assert second < 10
    first, second = (rate for index, rate in rates if index == 1)
    assert first == 0
    assert second > 1.5


def test_forwards_of_many_rows_have_few_sizes():
    """Every size has kernels of its own, which stay in memory."""
    rows = set()

    class Fan:
        @hookimpl
        def propose(self, step):
            return union([TokenTree.chain(step.ids[-1], [token], [-3.0]) for token in range(5 + step.index % 40)])

        @hookimpl
        def observe(self, step):
            rows.add(step.rows)

    compose(tiny(), Fan(), budget=64).generate(prompt(), max_new_tokens=60, do_sample=False)
    assert {7, 8, 9, 10, 11} < rows
    assert {size for size in rows if size >= 12} == set(range(12, 45, 4))


def test_a_curve_that_was_measured_flat_is_not_a_fixed_number_of_rows():
    """Where forwards of all sizes cost the same a drafter still takes its time."""
    level = Budget((1, 8), (128, 640), ((1.0, 1.0), (1.0, 1.0)))
    assert not level.fixed
    assert Budget.flat(8).fixed
    rows = BestRows()
    step = Step([5], 61, level, 10, drafters=("dear",))
    step.memory[rows] = None
    rows.start(step)
    for index in range(40):
        step.index, step.drafting, step.rows = index, {"dear": 100.0}, 1
        rows.fit(step, TokenTree.chain(5), [])
    assert rows.asked["dear"].wait > 1
