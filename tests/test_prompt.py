"""Prompt tokens in the verify forward: who sees whom, ensembles, guesses and their worth."""

import numpy as np
import pytest
import torch
from tiny import FAMILIES, Oracle, prompt, prompt_tokens, tiny

from ppd_compose import Step, TokenTree, compose, hookimpl
from ppd_compose.accuracy import marginal_gains
from ppd_compose.device import _packed, for_host, on_host
from ppd_compose.ensemble import average, guesses
from ppd_compose.top import best_tokens


class Watches:
    """Keeps the answers of one drafter, with the sequence they belong to."""

    def __init__(self, drafter):
        self.drafter, self.seen = drafter, []

    @hookimpl
    def observe(self, step: Step):
        answer = step.answers.get(self.drafter)
        if answer is not None:
            self.seen.append((list(step.ids[:-1]), answer))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt"])
@pytest.mark.parametrize(("n", "v"), [(1, 1), (3, 1), (2, 3)])
def test_an_answer_is_what_the_model_says_after_sequence_and_prompt_tokens(family, n, v):
    """Embedding j of token i sees the sequence and embedding j of the tokens before i: nothing of the tree."""
    base = tiny(family)
    answer = base.generate(prompt(), max_new_tokens=40, do_sample=False)[0].tolist()
    drafter = prompt_tokens(n, v)
    watch = Watches(drafter)
    compose(base, drafter, Oracle(answer), plugins=[watch], budget=64).generate(
        prompt(), max_new_tokens=25, do_sample=False
    )
    compared = 0
    embed = base.get_input_embeddings()
    for ids, told in watch.seen:
        for row, kind in enumerate(told.kinds.tolist()):
            i, j = divmod(kind, v)
            chain = drafter.embeddings[: i + 1, j].to(base.dtype)
            alone = torch.cat([embed(torch.tensor([ids])), chain[None]], dim=1)
            torch.testing.assert_close(told.logits[row], base(inputs_embeds=alone).logits[0, -1])
            compared += 1
    assert compared > 2


def test_the_distributions_of_an_ensemble_are_averaged():
    logits = torch.randn(3, 50, dtype=torch.float64)
    torch.testing.assert_close(average(logits), logits.softmax(-1).mean(0).log().float())


def test_guesses_come_from_a_device_in_one_copy_as_they_are():
    claims, tokens = torch.randn(3, 10, generator=torch.Generator().manual_seed(0)), torch.arange(30).view(3, 10) * 9999
    for ours, theirs in zip(on_host(_packed(claims, tokens)), on_host(*for_host(claims, tokens)), strict=True):
        assert (ours.dtype, ours.tolist()) == (theirs.dtype, theirs.tolist())
    assert ours.tolist() == tokens.tolist()


@pytest.mark.parametrize("vocab", [5, 300, 2560, 5120, 9999])
def test_the_best_guesses_are_those_of_topk(vocab):
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab))
    top, best = best_tokens(logits, 10)
    expected = logits.log_softmax(-1).topk(min(10, vocab))
    torch.testing.assert_close(top, expected.values)
    assert torch.equal(best, expected.indices)


def test_all_families_take_prompt_tokens_below_any_node():
    for family in FAMILIES:
        base = tiny(family, attention="eager")
        answer = base.generate(prompt(), max_new_tokens=30, do_sample=False)[0].tolist()
        model = compose(base, prompt_tokens(2), Oracle(answer), budget=64)
        model.generate(prompt(), max_new_tokens=12, do_sample=False)
        assert model.stats.candidates["ppd"].total() > 0, family


def test_rows_are_worth_the_chance_that_their_node_is_the_last():
    tokens = prompt_tokens(2, 2)
    step = Step([5], 61, None, 10)
    tokens.start(step, tiny())
    tree = TokenTree.chain(5, [1], [float(np.log(0.25))])
    rows = tokens.append(step, tree)
    worth = tokens.gains(step.rows) / 2
    expected = np.concatenate([0.75 * np.repeat(worth, 2), 0.25 * np.repeat(worth, 2)])
    assert rows.gains == pytest.approx(expected)
    assert rows.parents.tolist() == [0, 0, 2, 3, 1, 1, 6, 7]
    with pytest.raises(ValueError, match="read-only"):  # the next step gets the same
        rows.parents[:] = 0


def test_far_prompt_tokens_are_worth_little_where_few_guesses_are_verified():
    tokens = prompt_tokens(3)
    shares = [tokens.gains(rows)[1:].sum() / tokens.gains(rows).sum() for rows in (1, 4, 8, 64)]
    assert shares[0] == shares[1] < shares[2] < shares[3]


def test_rows_of_a_distance_are_averaged_in_whatever_order_they_stand():
    logits, order = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)), [0, 2, 1, 3]
    mine = guesses(logits, distances=(0, 0, 1, 1))
    other = guesses(logits[order], distances=(0, 1, 0, 1))
    assert all(torch.allclose(a, b) for a, b in zip(mine, other, strict=True))


def test_gains_do_not_hang_on_the_order_of_ranks():
    accuracy = np.array([[0.5, 0.2, 0.1], [0.4, 0.1, 0.05]])
    assert marginal_gains(accuracy[:, [2, 0, 1]], 4) == pytest.approx(marginal_gains(accuracy, 4))


def test_gains_are_differences_of_expected_acceptance():
    accuracy = np.array([[0.5, 0.2], [0.4, 0.1]])
    one = 0.5 + 0.2
    both = one + 0.5 * 0.4  # the third best path of both distances
    assert marginal_gains(accuracy, 3) == pytest.approx([one, both - one])
