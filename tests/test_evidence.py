"""Claims of several drafters become one chance that holds, learnt while decoding."""

import numpy as np
import pytest
from tiny import VOCAB, prompt, prompt_tokens, tiny

from ppd_compose import Budget, Step, TokenTree, compose, hookimpl
from ppd_compose.alternatives import AlwaysAsk, HighestClaim
from ppd_compose.evidence import Evidence
from ppd_compose.logit import ConditionalLogit


def step_over(evidence, trees, following):
    """Merge, then be told which tokens followed the root; the merged tree."""
    step = Step([5], 61, Budget.flat(8), 10)
    marked = [TokenTree.chain(5), *(tree.marked(1 << i) for i, tree in enumerate(trees))]
    tree = evidence.merge(step, marked)
    step.ids, step.path, step.tree = [5, *following], list(range(len(following))), tree
    evidence.observe(step)
    step.catch_up()
    return tree


def children(*claims):
    """Children of the root, tokens 10, 11, ..., with these claims."""
    return TokenTree.of([5, *range(10, 10 + len(claims))], [-1] + [0] * len(claims), [0.0, *np.log(claims)])


def chance(tree, token):
    found = tree.child(0, token)
    return float(np.exp(tree.log_probs[found]))


def test_weights_of_a_known_choice_are_found():
    dice = np.random.default_rng(0)
    true, logit = np.array([1.0, -2.0]), ConditionalLogit(np.zeros(2), np.ones(2))
    for _ in range(800):
        features = dice.normal(size=(3, 2))
        chances = np.append(np.exp(features @ true), 1.0)
        happened = np.arange(3) == dice.choice(4, p=chances / chances.sum())
        logit.learn(features, np.zeros(3, int), happened)
    assert logit.weights == pytest.approx(true, abs=0.3)


def test_sure_claims_that_were_right_never_make_it_diverge():
    logit = ConditionalLogit(np.array([0.0, 1.0]), np.full(2, 4.0))
    features = np.column_stack([np.ones(62), np.full(62, -9.0)])
    for turn in range(40):
        features[:, 1] = -9.0 if turn % 2 else 4.0
        logit.learn(features, np.arange(62), np.ones(62, bool))
        assert np.isfinite(logit.weights).all()
        assert np.isfinite(logit.chances(features, np.arange(62))).all()
    assert np.abs(logit.weights).max() < 20


def test_of_a_token_that_was_right_but_not_verified_nothing_is_learnt_below():
    evidence = Evidence(["one"])
    before = evidence.learners[1].weights.copy()
    for _ in range(50):
        step_over(evidence, [TokenTree.chain(5, [10, 11], np.log([0.9, 0.9]))], [10])
    assert evidence.learners[1].weights == pytest.approx(before)


def test_impossible_claims_are_legal_and_never_believed():
    tree = TokenTree.of([5, 10, 11], [-1, 0, 1], [0.0, -np.inf, -np.inf])
    merged = step_over(Evidence(["one"]), [tree], [10])
    assert (np.exp(merged.log_probs[1:]) < 0.01).all()


def test_claims_of_a_single_drafter_are_taken_as_they_are_at_first():
    tree = TokenTree.of([5, 1, 2, 3], [-1, 0, 0, 1], np.log([1.0, 0.5, 0.3, 0.2]))
    merged = step_over(Evidence(["one"]), [tree], [])
    assert merged.tokens.tolist() == [5, 1, 2, 3]
    assert np.exp(merged.log_probs) == pytest.approx([1.0, 0.5, 0.3, 0.2])


def test_a_drafter_that_boasts_is_believed_less():
    evidence, dice = Evidence(["one"]), np.random.default_rng(0)
    for _ in range(200):
        merged = step_over(evidence, [children(0.9)], [10 if dice.random() < 0.3 else 20])
    assert chance(merged, 10) == pytest.approx(0.3, abs=0.1)


def test_two_who_agree_are_believed_more_than_either():
    evidence, dice = Evidence(["one", "other"]), np.random.default_rng(0)
    for _ in range(400):
        right = int(dice.integers(10, 13))
        told = [right if dice.random() < 0.6 else int(dice.integers(10, 13)) for _ in range(2)]
        trees = [TokenTree.chain(5, [token], [np.log(0.6)]) for token in told]
        step_over(evidence, trees, [right])
    agreed = step_over(evidence, [children(0.6), children(0.6)], [])
    apart = step_over(evidence, [children(0.6), TokenTree.chain(5, [12], [np.log(0.6)])], [])
    assert chance(agreed, 10) == pytest.approx(0.93, abs=0.06)  # 1 - 0.2667^2 / (0.7333^2 + ...), by Bayes' rule
    assert chance(apart, 10) == pytest.approx(chance(apart, 12), abs=0.15)
    assert chance(apart, 10) < 0.6


def test_chances_of_siblings_never_add_up_to_more_than_one():
    dice = np.random.default_rng(0)
    for _ in range(20):
        trees = [children(*dice.dirichlet(np.ones(4))) for _ in range(3)]
        merged = step_over(Evidence(["one", "other", "third"]), trees, [])
        assert np.exp(merged.log_probs[1:]).sum() <= 1 + 1e-9
        assert (merged.stop_chances() >= 0).all()


def test_an_extender_adds_evidence_for_nodes_that_it_marks():
    evidence, step = Evidence(["one", "other"]), Step([5], 61, Budget.flat(8), 10)
    alone = evidence.merge(step, [TokenTree.chain(5), children(0.3, 0.3).marked(1)])
    agreed = evidence.merge(step, [TokenTree.chain(5), children(0.3, 0.3).marked(1), children(0.8).marked(2)])
    assert chance(agreed, 10) > chance(alone, 10) > chance(agreed, 11)
    assert agreed.sources.tolist() == [0, 3, 1]


class Boaster:
    """Knows the answer, says so four times of ten, and claims the same whether or not."""

    def __init__(self, answer):
        self.answer, self.dice = answer, np.random.default_rng(0)

    @hookimpl
    def propose(self, step):
        ahead = np.asarray(self.answer[len(step.ids) : len(step.ids) + 4])
        tokens = ahead if self.dice.random() < 0.4 else (ahead + 3) % VOCAB
        return TokenTree.chain(step.ids[-1], tokens.tolist(), [-0.1] * len(tokens))


def test_claims_of_many_siblings_that_add_up_to_more_than_one_are_put_right():
    merged = step_over(Evidence(["one", "other"]), [children(*[0.5] * 300), children(*[0.9] * 300)], [10])
    chances = np.exp(merged.log_probs[1:])
    assert chances.sum() <= 1 + 1e-9
    assert (chances > 0).all()


def test_expected_tokens_are_those_that_come():
    base = tiny()
    answer = base.generate(prompt(), max_new_tokens=140, do_sample=False)[0].tolist()
    model, told = compose(base, prompt_tokens(), Boaster(answer), budget=16), []
    for _ in range(12):
        model.generate(prompt(), max_new_tokens=140, do_sample=False)
        told.append(model.stats)
    assert sum(stats.forwards for stats in told) > 500
    expected, came = (sum(getattr(stats, name) for stats in told[3:]) for name in ("expected", "tokens"))
    assert expected == pytest.approx(came, rel=0.05)


def test_what_was_learnt_serves_the_next_generation_and_another_composition_by_file_only(tmp_path):
    base = tiny()
    answer = base.generate(prompt(), max_new_tokens=140, do_sample=False)[0].tolist()

    def first_claim(model):
        claims = []

        class Sees:
            @hookimpl
            def fit(self, step, tree):
                claims.append(float(np.exp(tree.log_probs[1])) if len(tree) > 1 else None)

        model.plugins.manager.register(Sees())
        model.generate(prompt(), max_new_tokens=140, do_sample=False)
        return claims[0]

    model, other = (compose(base, Boaster(answer), budget=16) for _ in range(2))
    boast = first_claim(model)
    assert boast == pytest.approx(np.exp(-0.1))
    assert first_claim(model) < 0.7
    assert first_claim(other) == pytest.approx(boast)
    model.save_calibration(tmp_path / "calibration.json")
    believed = first_claim(compose(base, Boaster(answer), budget=16, calibration=tmp_path / "calibration.json"))
    assert believed == pytest.approx(first_claim(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda told: "[]", "an object was expected"),
        (lambda told: told.replace("Boaster", "Other"), r"learnt with drafters \['Other'\], this composition has"),
        (lambda told: told.replace('"learnt"', '"lost"'), "is no calibration"),
        (lambda told: told[:-30], "JSON"),
        (lambda told: told.replace('"weights": [', '"weights": [1.0, '), "is no calibration"),
        (
            lambda told: told.replace('"weights": [', '"weights": [NaN, ').replace(", 0.0], ", "], "),
            "is no calibration",
        ),
    ],
)
def test_a_file_that_is_no_calibration_of_these_drafters_is_refused(change, message, tmp_path):
    compose(tiny(), Boaster([]), budget=16).save_calibration(path := tmp_path / "calibration.json")
    compose(tiny(), Boaster([]), budget=16, calibration=path)
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        compose(tiny(), Boaster([]), budget=16, calibration=path)
    with pytest.raises(FileNotFoundError):
        compose(tiny(), Boaster([]), budget=16, calibration=tmp_path / "none.json")


def test_no_step_is_missing_from_what_was_learnt():
    evidence, drafted = Evidence(["one"]), children(0.5, 0.3)
    for _ in range(400):  # by now steps are learnt from several at a time
        step_over(evidence, [drafted], [10])
        before = evidence.learnt()["learnt"][0]["weights"]
        step_over(evidence, [drafted], [12])
        assert evidence.learnt()["learnt"][0]["weights"] != before


def test_several_steps_at_a_time_teach_what_one_at_a_time_does():
    dice, drafted = np.random.default_rng(0), children(0.6, 0.2)
    together, apart = Evidence(["one"]), Evidence(["one"])
    for token in dice.choice([10, 11, 12], 600, p=[0.2, 0.5, 0.3]).tolist():
        for evidence in (together, apart):
            tree = step_over(evidence, [drafted], [token])
        apart.settle()
    assert chance(tree, 10) == pytest.approx(0.2, abs=0.08)
    assert together.learners[0].weights == pytest.approx(apart.learners[0].weights, abs=0.05)


def test_alternatives_take_the_place_of_the_defaults():
    base = tiny()
    answer = base.generate(prompt(), max_new_tokens=60, do_sample=False)
    seen = []

    class Sees:
        @hookimpl
        def observe(self, step):
            seen.append(float(np.exp(step.tree.log_probs).sum()))

    drafters = [prompt_tokens(), Boaster(answer[0].tolist())]
    model = compose(base, *drafters, budget=16, plugins=[HighestClaim(), AlwaysAsk(), Sees()])
    assert model.generate(prompt(), max_new_tokens=60, do_sample=False).tolist() == answer.tolist()
    chain = 1 + sum(np.exp(-0.1 * depth) for depth in range(1, 5))
    assert max(seen) >= chain - 1e-9  # boasts are believed to the end
