"""PPD's dynamic sparse trees, made beforehand."""

from itertools import combinations

import numpy as np
import pytest
from tiny import prompt, prompt_tokens, tiny

from ppd_compose import compose
from ppd_compose.offline import OfflinePromptTokens, _solved, sparse_trees

ACCURACY = np.array([[0.4, 0.15, 0.08, 0.05], [0.2, 0.1, 0.05, 0.03], [0.12, 0.06, 0.04, 0.02]])


def long_run(trees):
    return float(_solved(trees)[0])


def rows_of(tree, ensemble=1):
    return len(tree.shape) + ensemble * int(tree.prompts.sum())


@pytest.mark.parametrize("rows", [2, 4, 9, 16, 64])
@pytest.mark.parametrize("ensemble", [1, 3])
def test_every_state_has_a_tree_within_the_rows(rows, ensemble):
    if rows < 1 + ensemble:
        with pytest.raises(ValueError, match=f"need {1 + ensemble} rows, got {rows}"):
            sparse_trees(ACCURACY, rows, ensemble)
        return
    trees = sparse_trees(ACCURACY, rows, ensemble)
    assert len(trees) == 4
    assert trees[0].shape.tokens.tolist() == [0]
    assert trees[0].prompts.tolist() == [min(3, (rows - 1) // ensemble)]
    for known, tree in enumerate(trees):
        assert rows_of(tree, ensemble) <= rows
        assert tree.depths.max() <= known
        assert tree.prompts.max() <= 3


def test_the_likeliest_rank_need_not_be_the_first():
    order = np.array([2, 0, 3, 1])
    for mine, other in zip(sparse_trees(ACCURACY, 9), sparse_trees(ACCURACY[:, order], 9), strict=True):
        assert other.shape.parents.tolist() == mine.shape.parents.tolist()
        assert order[other.shape.tokens[1:]].tolist() == mine.shape.tokens[1:].tolist()
        assert other.prompts.tolist() == mine.prompts.tolist()


def test_more_rows_make_more_tokens():
    found = [long_run(sparse_trees(ACCURACY, rows)) for rows in (2, 4, 8, 16, 32, 64)]
    assert found == sorted(found)
    assert found[-1] > found[0] + 0.3


def test_tokens_of_the_long_run_are_those_of_a_simulation():
    trees, dice = sparse_trees(ACCURACY, 16), np.random.default_rng(0)
    state, tokens, steps = 0, 0, 20_000
    for _ in range(steps):
        tree, node = trees[state], 0
        right = [dice.choice(5, p=[*row, 1 - row.sum()]) for row in ACCURACY]
        while child := tree.shape.child(node, right[tree.depths[node]]) if tree.depths[node] < state else None:
            node = child
        tokens += 1 + int(tree.depths[node])
        state = int(tree.prompts[node])
    assert tokens / steps == pytest.approx(long_run(trees), rel=0.01)


def test_no_other_tree_of_one_prompt_token_is_better():
    """With one distance and 4 rows every policy can be listed: candidates, and the nodes with a prompt token."""
    accuracy, found = ACCURACY[0], []
    for size in range(4):
        stops = np.array([1 - accuracy[:size].sum(), *accuracy[:size]])
        for below in combinations(range(1 + size), 3 - size if size else 1):
            again = stops[list(below)].sum()  # the chance that the next forward has guesses too
            having = 1 / (2 - again)  # from a forward without guesses the next one has some
            found.append(1 + having * accuracy[:size].sum())
    assert long_run(sparse_trees(ACCURACY[:1], 4)) == pytest.approx(max(found))


@pytest.mark.parametrize("ensemble", [1, 2])
def test_the_same_tokens_and_never_more_rows(ensemble):
    base, rows = tiny(), []
    model = compose(base, OfflinePromptTokens(prompt_tokens(v=ensemble), 12), budget=64)
    for seed in range(3):
        ids = prompt(seed=seed)
        expected = base.generate(ids, max_new_tokens=60, do_sample=False)
        assert model.generate(ids, max_new_tokens=60, do_sample=False).tolist() == expected.tolist()
        rows.append(model.stats.rows_per_forward)
    assert 6 < max(rows) <= 12
