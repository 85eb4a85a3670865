"""Where an accepted path ends, as a device finds it, is where the host's walk ends."""

import numpy as np
import pytest
import torch

from ppd_compose import Appended, TokenTree
from ppd_compose.accept import MatchPicks
from ppd_compose.lineage import ancestors
from ppd_compose.reached import end_of, rows_below
from ppd_compose.tree import stacked_parents

VOCAB = 4  # so that many picks are right


def random_tree(random, size):
    """Siblings hold different tokens."""
    children, parents, tokens = [[]], [-1], [0]
    while len(tokens) < size:
        parent = int(random.integers(len(tokens)))
        free = [token for token in range(VOCAB) if token not in children[parent]]
        if free:
            children[parent].append(token := int(random.choice(free)))
            children.append([])
            parents.append(parent)
            tokens.append(token)
    return TokenTree.of(tokens, parents, np.zeros(size))


def random_rows(random, nodes):
    """A chain of up to three rows below some nodes."""
    kinds, parents, hung = [], [], []
    for node in range(nodes):
        for kind in range(int(random.integers(4))):
            parents.append(nodes + len(parents) - 1 if kind else node)
            kinds.append(kind)
            hung.append(node)
    return Appended(torch.zeros(3, 1), np.array(kinds, int), np.array(parents, int), np.array(hung, int), np.ones(0))


@pytest.mark.parametrize("seed", range(40))
def test_a_path_ends_where_the_hosts_walk_does(seed):
    random = np.random.default_rng(seed)
    tree = random_tree(random, int(random.integers(1, 24)))
    blocks = [rows for rows in (random_rows(random, len(tree)) for _ in range(2)) if len(rows)]
    idle = int(random.integers(3))
    parents = np.concatenate([stacked_parents(tree, blocks), np.full(idle, -1)])
    words = np.concatenate([tree.tokens, *(rows.kinds for rows in blocks), np.zeros(idle, int)])
    picks = random.integers(VOCAB, size=len(words))
    *_, (last, _) = MatchPicks().accept(tree, picks.__getitem__)
    given = map(torch.from_numpy, (words, np.array([len(tree)]), ancestors(parents), picks))
    end = end_of(*given)
    assert end.node.tolist() == [last]
    begin = len(tree)
    for rows in blocks:
        most, mine = int(np.bincount(rows.nodes).max()), begin + np.flatnonzero(rows.nodes == last)
        found = rows_below(end, begin, len(rows), most)
        assert found[: len(mine)].tolist() == mine.tolist()
        assert found.shape == (most,)
        assert int(found.max()) < len(words)
        begin += len(rows)
