"""Rows and drafters are bought only where they pay, and get another chance."""

import time

import pytest
from tiny import Oracle, prompt, prompt_tokens, tiny

from ppd_compose import Budget, TokenTree, compose, hookimpl
from ppd_compose.asking import TRIED, Asked

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


def test_a_drafter_that_does_not_pay_takes_a_hundredth_of_the_time_until_it_pays():
    asked, told = Asked(), {"seconds": 0.1, "rate": 10.0, "forward": 0.2}
    for _ in range(TRIED):
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


def test_a_quick_drafter_is_always_asked():
    asked = Asked()
    for _ in range(50):
        assert asked.turn()
        asked.judge(seconds=0.001, gained=0.0, rate=10.0, forward=0.2)


class Slow:
    """Guesses what never comes, and takes its time."""

    name = "slow"

    def __init__(self):
        self.asked = 0

    @hookimpl
    def propose(self, step):
        self.asked += 1
        time.sleep(0.01)
        return TokenTree.chain(step.ids[-1], [0], [-1.0])


def test_a_slow_drafter_that_adds_nothing_is_asked_seldom():
    base, slow = tiny(), Slow()
    answer = base.generate(prompt(), max_new_tokens=100, do_sample=False)
    budget = Budget((1, 64), (0,), ((0.01, 0.02),))
    model = compose(base, Oracle(answer[0].tolist(), depth=1), slow, budget=budget)
    assert model.generate(prompt(), max_new_tokens=100, do_sample=False).tolist() == answer.tolist()
    assert slow.asked < model.stats.forwards / 2


@pytest.mark.parametrize("drafter", ["oracle", "slow"])
def test_with_rows_that_cost_nothing_everyone_is_asked(drafter):
    base, slow = tiny(), Slow()
    answer = base.generate(prompt(), max_new_tokens=20, do_sample=False)
    oracle = Oracle(answer[0].tolist())
    model = compose(base, oracle, slow, budget=16)
    model.generate(prompt(), max_new_tokens=20, do_sample=False)
    assert set(model.stats.candidates) == {"oracle", "slow"}
    assert slow.asked == model.stats.forwards - 1
