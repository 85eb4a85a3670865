"""The budget: what is measured, what is kept, and that rows are bought only where they pay."""

import json

import numpy as np
import pytest
import torch
from tiny import Oracle, prompt, prompt_tokens, tiny

from ppd_compose import Budget, compose, hookimpl


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


@pytest.mark.parametrize(
    "text", ["", "[]", '{"rows": [1]}', json.dumps({"rows": [1], "contexts": [0], "seconds": [[-1]]})]
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
