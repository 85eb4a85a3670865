"""The budget: what is measured, what is kept, and that rows are bought only where they pay."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import Oracle, prompt, prompt_tokens, tiny

from ppd_compose import Budget, Step, compose, hookimpl, measured
from ppd_compose.measured import Watch
from ppd_compose.storage import cache_folder


def steep(cost: float) -> Budget:
    """Every row after the first costs `cost` forwards."""
    return Budget((1, 64), (0,), ((1.0, 1.0 + 63 * cost),))


def run(budget):
    base = tiny()
    answer = base.generate(prompt(), max_new_tokens=60, do_sample=False)[0].tolist()
    model = compose(base, prompt_tokens(), Oracle(answer, lie=2), budget=budget)
    assert model.generate(prompt(), max_new_tokens=60, do_sample=False)[0].tolist() == answer
    return model.stats


def test_where_rows_are_dear_plain_decoding_is_chosen():
    stats = run(steep(5.0))
    assert stats.rows_per_forward == 1
    assert stats.forwards == 60


def test_cheaper_rows_are_bought_more_often():
    rows = [run(steep(cost)).rows_per_forward for cost in (0.3, 0.03, 0.0)]
    assert rows == sorted(rows)
    assert rows[0] < rows[-1]


def test_curve_interpolates_between_rows_and_contexts():
    budget = Budget((1, 3), (100, 200), ((1.0, 2.0), (3.0, 6.0)))
    assert budget.curve(100) == pytest.approx([1.0, 1.5, 2.0])
    assert budget.curve(150) == pytest.approx([2.0, 3.0, 4.0])
    assert budget.curve(5000) == pytest.approx([3.0, 4.5, 6.0])


def test_measured_seconds_are_positive_and_rise_with_the_rows(tmp_path):
    budget = Budget.measure(tiny(dtype=torch.float32), rounds=1)
    table = np.asarray(budget.seconds)
    assert (table > 0).all()
    assert (np.diff(table, axis=1) >= 0).all()
    budget.save(tmp_path / "budget.json")
    assert Budget.load(tmp_path / "budget.json") == budget


@pytest.mark.parametrize("busy", [0, 25, 45])
def test_a_machine_that_is_busy_for_a_while_is_measured_until_it_is_quiet(monkeypatch, busy):
    timed = []

    def seconds(model, cache, rows):
        timed.append(rows)
        return 0.0003 * rows * (3 if len(timed) < busy and rows > 8 else 1)

    monkeypatch.setattr("ppd_compose.budget._time_forward", seconds)
    budget = Budget.measure(tiny(dtype=torch.float32), rounds=2)
    assert budget.seconds[0] == pytest.approx([0.0003 * rows for rows in budget.rows])


def test_forwards_that_take_long_are_timed_a_few_times_each(monkeypatch):
    timed = Counter()

    def seconds(model, cache, rows):
        timed[rows] += 1
        return 0.2 * rows

    monkeypatch.setattr("ppd_compose.budget._time_forward", seconds)
    budget = Budget.measure(tiny(dtype=torch.float32))
    assert budget.seconds[0] == pytest.approx([0.2 * rows for rows in budget.rows])
    contexts = len(budget.contexts)
    assert timed[1] == 4 * contexts  # one that warms up, and half a second
    assert {timed[rows] for rows in budget.rows if rows > 2} == {2 * contexts}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"rows": [1]}',
        json.dumps({"rows": [1], "contexts": [0], "seconds": [[-1]]}),
        json.dumps({"rows": [1, 2**20], "contexts": [0], "seconds": [[1, 1]]}),
        json.dumps({"rows": [1, 4096], "contexts": list(range(99999)), "seconds": [[1, 1]] * 99999}),
    ],
)
def test_a_damaged_file_is_named(tmp_path, text):
    path = tmp_path / "budget.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"budget\.json is no budget"):
        Budget.load(path)


def test_forwards_come_in_few_sizes():
    class Counts:
        @hookimpl
        def observe(self, step):
            sizes.append(step.rows)

    sizes = []
    base = tiny()
    model = compose(base, prompt_tokens(), budget=Budget((1, 64), (0,), ((1.0, 4.0),)), plugins=[Counts()])
    model.generate(prompt(), max_new_tokens=40, do_sample=False)
    rows = sizes[:-8]  # near the end there is no room for deeper rows
    assert len(set(rows)) > 2
    assert all(count == 1 or count % 4 == 0 for count in rows)


def observed(watch, budget, seconds, times=50):
    """Forwards of some rows that took `seconds` by rows."""
    for _ in range(times):
        for rows, took in seconds.items():
            watch.observe(Step([5], 61, budget, 10, index=2, rows=rows, seconds=took))


def test_a_budget_that_disagrees_with_what_forwards_take_is_corrected_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("ppd_compose.measured.cache_folder", lambda: tmp_path)
    base, budget, watch = tiny(), Budget((1, 8, 64), (160,), ((1.0, 1.1, 1.2),)), Watch()
    observed(watch, budget, {1: 1.0, 8: 2.2})
    better = watch.kept_true(base, budget)
    assert better.seconds[0] == pytest.approx([1.0, 2.2, 2.4], rel=0.05)
    (file,) = (tmp_path / "budgets").iterdir()
    assert Budget.load(file) == better
    observed(watch, better, {1: 1.0, 8: 2.2})
    assert watch.kept_true(base, better) is better


def test_sizes_that_disagree_by_a_tenth_correct_the_budget(tmp_path, monkeypatch):
    monkeypatch.setattr("ppd_compose.measured.cache_folder", lambda: tmp_path)
    base, budget, watch = tiny(), Budget((1, 8, 64), (160,), ((1.0, 1.1, 1.2),)), Watch()
    observed(watch, budget, {1: 1.0, 8: 1.15})
    assert watch.kept_true(base, budget) is budget
    observed(watch, budget, {1: 1.0, 8: 1.25}, times=150)
    assert watch.kept_true(base, budget).seconds[0][1] == pytest.approx(1.25, rel=0.05)


def test_a_machine_that_is_slower_throughout_and_forwards_of_long_ago_change_nothing():
    base, budget, watch = tiny(), Budget((1, 8, 64), (160,), ((1.0, 1.1, 1.2),)), Watch()
    observed(watch, budget, {1: 3.0, 8: 3.2})
    assert watch.kept_true(base, budget) is budget
    observed(watch, budget, {64: 9.0}, times=30)
    observed(watch, budget, {1: 1.0, 8: 1.1}, times=200)
    assert watch.kept_true(base, budget) is budget


def test_a_machine_that_changes_from_text_to_text_changes_nothing():
    """Though most forwards of 8 rows fall where it is slow, and most of one row where it is not."""
    base, budget, watch = tiny(), Budget((1, 8, 64), (160,), ((1.0, 1.1, 1.2),)), Watch()
    for text in range(12):
        slow, often, seldom = (1.5, 8, 1) if text % 2 else (1.0, 1, 8)
        watch.observe(Step([5], 61, budget, 10, index=1))
        for number in range(20):
            rows = seldom if number % 4 == 3 else often
            took = slow * {1: 1.0, 8: 1.1}[rows]
            watch.observe(Step([5], 61, budget, 10, index=2 + number, rows=rows, seconds=took))
    assert watch.kept_true(base, budget) is budget


def test_a_measured_budget_is_watched(tmp_path, monkeypatch):
    monkeypatch.setattr("ppd_compose.measured.cache_folder", lambda: tmp_path)
    base = tiny()
    answer = base.generate(prompt(), max_new_tokens=60, do_sample=False)
    model = compose(base, prompt_tokens())
    for _ in range(2):
        assert model.generate(prompt(), max_new_tokens=60, do_sample=False).tolist() == answer.tolist()
    assert len(model.watch.latest) > 50


def test_a_given_budget_is_never_corrected():
    base, budget = tiny(), Budget((1, 64), (160,), ((1e-9, 1.0),))
    model = compose(base, prompt_tokens(), budget=budget)
    for _ in range(3):
        model.generate(prompt(), max_new_tokens=100, do_sample=False)
    assert model.budget is budget


def test_correcting_scales_what_is_between_and_keeps_it_rising():
    budget = Budget((1, 2, 4), (100, 200), ((1.0, 2.0, 3.0), (2.0, 4.0, 6.0)))
    assert budget.corrected({1: 1.0, 4: 2.0}).seconds == (
        (1.0, pytest.approx(8 / 3), 6.0),
        (2.0, pytest.approx(16 / 3), 12.0),
    )
    assert budget.corrected({1: 4.0, 4: 1.0}).seconds[0] == (3.0, 3.0, 3.0)


def test_a_base_quantised_or_placed_otherwise_has_a_budget_of_its_own():
    plain, quantised, spread = tiny(), tiny(), tiny()
    quantised.register_buffer("packed_weight", torch.zeros(4, dtype=torch.uint8))
    spread.hf_device_map = {"model": 0, "lm_head": "cpu"}
    assert len({measured._path(base) for base in (plain, quantised, spread)}) == 3
    assert measured._path(plain) == measured._path(tiny())


def test_without_a_home_a_budget_is_measured_and_lasts_as_long_as_the_model(monkeypatch):
    def homeless(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("PPD_COMPOSE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    monkeypatch.setattr("ppd_compose.budget._time_forward", lambda model, cache, rows: 0.001 * rows)
    assert measured.measured_budget(tiny(dtype=torch.float32)).max_rows == 64
    with pytest.raises(OSError, match="set PPD_COMPOSE_HOME"):
        cache_folder()


@pytest.mark.parametrize(
    ("family", "settings"), [("gpt2", {"n_positions": 32}), ("opt", {"max_position_embeddings": 64})]
)
def test_a_base_of_few_positions_is_measured_within_them(family, settings, monkeypatch, tmp_path):
    monkeypatch.setattr("ppd_compose.measured.cache_folder", lambda: tmp_path)
    base, ids = tiny(family, dtype=torch.float32, **settings), prompt()
    model = compose(base, prompt_tokens())
    how = {"max_new_tokens": 15, "do_sample": False}
    assert torch.equal(model.generate(ids, **how), base.generate(ids, **how))
    assert model.budget.max_rows < 64
