"""Candidate trees: built, merged, cut; and who sees whom."""

import itertools

import numpy as np
import pytest
import torch
from tiny import array

from ppd_compose import Appended, TokenTree
from ppd_compose.forest import Committed, Forest
from ppd_compose.lineage import ancestors, row_depths
from ppd_compose.tree import cut, likeliest_first, shallow, stacked_parents, union


def paths(tree):
    """Every path as a tuple of tokens, with its claim."""
    found = {}
    for node in range(len(tree)):
        path, at = [], node
        while at >= 0:
            path.append(int(tree.tokens[at]))
            at = int(tree.parents[at])
        found[tuple(path[::-1])] = float(tree.log_probs[node])
    return found


def test_a_chain_claims_the_product_of_its_tokens():
    tree = TokenTree.chain(7, [1, 2], [-0.5, -0.25])
    assert paths(tree) == {(7,): 0.0, (7, 1): -0.5, (7, 1, 2): -0.75}


def test_product_takes_the_likeliest_paths():
    claims = np.log([[0.6, 0.3], [0.5, 0.4]])
    tree = TokenTree.product(9, [[1, 2], [3, 4]], claims.tolist(), 5)
    expected = {(9,): 1.0, (9, 1): 0.6, (9, 1, 3): 0.3, (9, 2): 0.3, (9, 1, 4): 0.24}
    assert {path: pytest.approx(np.exp(claim)) for path, claim in paths(tree).items()} == expected
    assert np.all(np.diff(tree.log_probs) <= 1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_product_takes_the_likeliest_of_all_paths(seed):
    """Against every path there is, many of which claim the same."""
    dice = np.random.default_rng(seed)
    depths, ranks, size = (int(dice.integers(1, most)) for most in (5, 7, 40))
    claims = -np.sort(dice.integers(0, 6, (depths, ranks)), axis=1) / 4
    tree = TokenTree.product(9, [np.arange(ranks)] * depths, list(claims), size)
    every = [sum(path) for depth in range(depths + 1) for path in itertools.product(*claims[:depth])]
    assert sorted(paths(tree).values()) == sorted(every)[-size:]
    assert all(
        sum(claims[at, word] for at, word in enumerate(path[1:])) == claim for path, claim in paths(tree).items()
    )


def test_product_of_no_distances_is_the_bare_root():
    assert len(TokenTree.product(9, [], [], 5)) == 1


def test_union_keeps_each_path_once_with_the_higher_claim_and_all_sources():
    one = TokenTree.of([5, 1, 2], [-1, 0, 1], [0.0, -1.0, -2.0]).marked(1)
    two = TokenTree.of([5, 3, 1, 2], [-1, 0, 0, 2], [0.0, -0.1, -3.0, -1.5]).marked(2)
    for trees in ((one, two), (two, one)):
        merged = union([TokenTree.chain(5), *trees])
        assert paths(merged) == {(5,): 0.0, (5, 1): -1.0, (5, 1, 2): -1.5, (5, 3): -0.1}
        assert sorted(merged.sources.tolist()) == [0, 2, 3, 3]


def test_ancestors_and_depths():
    parents = array(-1, 0, 0, 2, 3)
    assert row_depths(parents).tolist() == [0, 1, 1, 2, 3]
    assert ancestors(parents)[4].tolist() == [True, False, True, True, True]
    assert ancestors(parents).sum(1).tolist() == [1, 2, 2, 3, 4]
    assert ancestors(array(-1, -1)).tolist() == [[True, False], [False, True]]
    assert ancestors(np.zeros(0, np.int64)).shape == (0, 0)


def hung(tree):
    """Two rows in a chain below every node."""
    nodes = np.arange(len(tree))
    parents = np.stack([nodes, len(tree) + 2 * nodes], 1).ravel()
    rows = np.tile(array(0, 1), len(tree))
    return Appended(torch.zeros(2, 4), rows, parents, np.repeat(nodes, 2), np.full(2 * len(tree), 0.1))


def test_rows_of_several_blocks_are_renumbered_together():
    tree = TokenTree.of([5, 1, 2, 3], [-1, 0, 0, 2], [0, -1, -1, -2])
    blocks = [hung(tree), hung(tree)]
    parents = stacked_parents(tree, blocks)
    assert parents[4:12].tolist() == [0, 4, 1, 6, 2, 8, 3, 10]
    assert parents[12:].tolist() == [0, 12, 1, 14, 2, 16, 3, 18]
    # Keep nodes 0, 2, 3; of the first block the rows below node 3, of the second the first row below node 2.
    small, (first, second) = cut(tree, blocks, array(0, 2, 3), array(10, 11, 16))
    assert paths(small) == {(5,): 0.0, (5, 2): -1.0, (5, 2, 3): -2.0}
    assert (first.parents.tolist(), first.nodes.tolist()) == ([2, 3], [2, 2])
    assert (second.parents.tolist(), second.nodes.tolist(), second.kinds.tolist()) == ([1], [1], [0])
    assert stacked_parents(small, [first, second]).tolist() == [-1, 0, 1, 2, 3, 1]


def test_shallow_drops_what_lies_too_deep():
    tree = TokenTree.chain(5, [1, 2, 3], [-1.0, -1.0, -1.0])
    small, (rows,) = shallow(tree, [hung(tree)], 2)
    assert len(small) == 3
    assert rows.nodes.tolist() == [0, 0, 1]


def test_stop_chances_sum_to_one():
    tree = TokenTree.of([5, 1, 2, 3], [-1, 0, 0, 2], np.log([1.0, 0.3, 0.5, 0.2]).tolist())
    assert tree.stop_chances() == pytest.approx([0.2, 0.3, 0.3, 0.2])


def test_the_likeliest_path_comes_first():
    tree = TokenTree.of([9, 1, 2, 3, 4, 5], [-1, 0, 0, 2, 1, 3], np.log([1.0, 0.3, 0.6, 0.5, 0.2, 0.1]))
    order = likeliest_first(tree, np.array([0, 2, 3, 1, 4, 5]))
    assert order.tolist() == [0, 2, 3, 5, 1, 4]
    again = tree.take(order)
    assert again.tokens.tolist() == [9, 2, 3, 5, 1, 4]
    assert again.parents.tolist() == [-1, 0, 1, 2, 0, 4]
    assert likeliest_first(tree, np.array([0, 2, 1])).tolist() == [0, 2, 1]


def test_what_accepted_paths_tell_of_the_guesses_below_them():
    drafted = TokenTree.of([7, 3, 4, 5, 6], [-1, 0, 0, 2, 1], np.log([1.0, 0.5, 0.4, 0.1, 0.2]))
    plain = TokenTree.chain(4)
    forest = Forest.of([Committed(drafted, [0, 2], [4, 9]), Committed(plain, [0], [3]), Committed(drafted, [0], [3])])
    assert forest.depths.tolist() == [0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2]
    claims, right = forest.judged()
    assert claims == pytest.approx([0.5, 0.4, 0.25, 0.5, 0.4])
    assert right.tolist() == [False, True, False, True, False]
