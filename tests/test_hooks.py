"""Hooks: their order, one test each, and what a plugin that is wrong gets."""

import inspect
import math
import re
import time
from dataclasses import replace
from weakref import ref

import numpy as np
import pytest
import simulated
import torch
from ppd_compose.integrations.recycling import TokenRecycling
from simulated import KIND, Simulated
from tiny import FAMILIES, VOCAB, Oracle, Returns, array, prompt, prompt_tokens, tiny

from ppd_compose import Appended, Budget, MalformedDraft, Step, TokenTree, compose, hookimpl, hookspecs
from ppd_compose.alternatives import HighestClaim
from ppd_compose.decode import Decoding
from ppd_compose.lineage import row_depths

HOOKS = [n for n, f in inspect.getmembers(hookspecs, inspect.isfunction) if hasattr(f, "ppd_compose_spec")]


def run(base=None, *drafters, plugins=(), tokens=12, **kwargs):
    base = base or tiny()
    model = compose(base, *drafters, budget=24, plugins=plugins)
    ids = prompt()
    return model, model.generate(ids, max_new_tokens=tokens, do_sample=False, **kwargs)


def answer(tokens=30):
    return tiny().generate(prompt(), max_new_tokens=tokens, do_sample=False)[0].tolist()


def test_every_hook_is_documented_and_has_a_test_that_calls_it():
    text = inspect.getsource(inspect.getmodule(test_every_hook_is_documented_and_has_a_test_that_calls_it))
    for name in HOOKS:
        assert inspect.getdoc(getattr(hookspecs, name)), name
        assert f"def test_hook_{name}(" in text, name
        assert f"def {name}(self" in text or f"def {name}(" in re.sub(r"def test_.*", "", text), name


def test_hooks_are_called_in_the_order_of_their_listing():
    calls = []

    def recorder(name):
        return hookimpl(tryfirst=True)(lambda self: calls.append(name))

    methods = {name: recorder(name) for name in HOOKS}
    for name, method in methods.items():
        method.__name__ = name
    spy = type("Spy", (), methods)()
    run(None, spy, tokens=2)
    source = inspect.getsource(hookspecs)
    listed = re.findall(r"^def (\w+)\(", source, re.MULTILINE)
    listed.remove("refine")  # there are no rows whose answer could be refined
    listed.remove("foretell")  # on a CPU nobody waits for a device
    first_token = ["accept", "observe"]  # the prefill yields it
    at = listed.index("start") + 1
    assert calls == listed[:at] + first_token + listed[at:]


def test_what_is_put_off_is_done_while_the_next_forward_is_computed_and_at_the_end():
    calls = []

    class PutsOff:
        @hookimpl
        def start(self, step):
            step.ending.callback(calls.append, "ending")

        @hookimpl
        def observe(self, step):
            step.later.append(lambda: calls.append("later"))

        @hookimpl
        def fit(self):
            calls.append("fit")

        @hookimpl
        def accept(self):
            calls.append("accept")

    base = tiny()
    base.lm_head.register_forward_hook(lambda *_: calls.append("forward"))
    model, _ = run(base, PutsOff(), tokens=3)
    step = ["fit", "forward", "later", "accept"]
    assert calls == ["forward", "accept", *step, *step, "later", "ending"]
    assert model.stats.seconds["meanwhile"] > 0


def test_stages_share_all_the_seconds_of_a_call(monkeypatch):
    whole, decode = [], Decoding.run

    def timed(decoding):
        begin = time.perf_counter()
        try:
            return decode(decoding)
        finally:
            whole.append(time.perf_counter() - begin)

    monkeypatch.setattr(Decoding, "run", timed)

    class Slow:
        name = "slow"

        @hookimpl
        def start(self):
            time.sleep(0.05)

        @hookimpl
        def append(self):
            time.sleep(0.02)

        @hookimpl
        def observe(self, step):
            step.later.append(lambda: time.sleep(0.01))

    model, _ = run(None, Slow(), tokens=3)
    seconds = model.stats.seconds
    assert seconds["call"] >= 0.05
    assert seconds["append slow"] >= 0.04
    assert seconds["meanwhile"] >= 0.03
    assert sum(seconds.values()) == pytest.approx(whole[0], rel=0.02)


def test_hook_prepare():
    class Picky:
        @hookimpl
        def prepare(self, model):
            raise ValueError(f"no {type(model).__name__}, please")

    with pytest.raises(ValueError, match="no LlamaForCausalLM"):
        compose(tiny(), Picky())


def test_hook_forward_kwargs():
    class Wants:
        def __init__(self, **wanted):
            self.wanted, self.name = wanted, f"wants-{wanted}"

        @hookimpl
        def forward_kwargs(self, model):
            return self.wanted

    _, out = run(None, Wants(output_attentions=False))
    assert out[0].tolist() == answer(12)
    with pytest.raises(ValueError, match="two plugins want output_attentions"):
        run(None, Wants(output_attentions=True), Wants(output_attentions=False))
    with pytest.raises(ValueError, match="by the hook hidden_layers"):
        run(None, Wants(output_hidden_states=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_hook_hidden_layers(family):
    """The states of every token, once each: the prompt's at the start, then those of each accepted path."""

    class Wants:
        def __init__(self, layers):
            self.layers, self.name, self.seen = layers, f"wants-{layers}", []

        @hookimpl
        def hidden_layers(self, model):
            return self.layers

        @hookimpl
        def start(self, step):
            self.seen.append(step.hidden_states)

        @hookimpl
        def observe(self, step):
            if step.index > 1:
                self.seen.append(step.hidden_states)

    base = tiny(family, attention="eager")  # the one that all offer
    right = base.generate(prompt(), max_new_tokens=30, do_sample=False)
    low, high = Wants([1]), Wants([1, 3])
    _, out = run(base, Oracle(right[0].tolist()), low, high, prefill_chunk_size=5)
    expected = base(out, output_hidden_states=True).hidden_states
    for layer in (1, 3):
        mine = torch.cat([states[layer] for states in high.seen])
        # Eager attention takes its softmax in float32.
        torch.testing.assert_close(mine, expected[layer][0, : len(mine)], atol=1e-4, rtol=1e-4)
    assert len(mine) >= out.shape[1] - 1
    with pytest.raises(ValueError, match=r"\[4\] were asked for, \w+ has those of 0 to 3"):
        run(base, Wants([4]))


def test_hook_start():
    class Starts:
        def __init__(self):
            self.seen = []

        @hookimpl
        def start(self, step, model):
            self.seen.append((list(step.ids), dict(step.memory), type(model).__name__))

    starts = Starts()
    run(None, starts)
    assert starts.seen == [(prompt()[0].tolist(), {}, "LlamaForCausalLM")]


def test_hook_ask():
    class Never:
        @hookimpl
        def ask(self, step, drafter):
            return False if drafter == "oracle" else None

    model, out = run(None, Oracle(answer()), prompt_tokens(), plugins=[Never()], tokens=20)
    assert out[0].tolist() == answer(20)
    assert set(model.stats.candidates["oracle"]) == set()
    assert model.stats.rows_per_forward > 1  # prompt tokens are asked


def test_hook_propose():
    model, out = run(None, Oracle(answer()), tokens=20)
    assert out[0].tolist() == answer(20)
    assert model.stats.forwards < 15


def test_hook_merge():
    class First:
        @hookimpl
        def merge(self, trees):
            return trees[0]

    model, out = run(None, Oracle(answer()), plugins=[First()])
    assert model.stats.forwards == 12
    assert out[0].tolist() == answer(12)


def test_hook_extend():
    right = answer(40)

    class Continues:
        """Grafts the right token below the deepest node of the merged tree."""

        name = "continues"

        @hookimpl
        def extend(self, step, tree):
            node, depth = 0, 0
            tokens, parents, claims = tree.tokens.tolist(), tree.parents.tolist(), tree.log_probs.tolist()
            while (child := tree.child(node, right[len(step.ids) + depth])) is not None:
                node, depth = child, depth + 1
            return TokenTree.of(
                [*tokens, right[len(step.ids) + depth]], [*parents, node], [*claims, claims[node] - 0.01]
            )

    model, out = run(None, Oracle(right, depth=2, lie=99), Continues(), tokens=20)
    assert out[0].tolist() == answer(20)
    assert set(model.stats.accepted["continues"]) == {3}  # credit for what it added, not for what it continued

    class Agrees:
        name = "agrees"

        @hookimpl
        def extend(self, step, tree):
            return replace(tree, sources=(row_depths(tree.parents) != 1).astype(np.int64))

    model, out = run(None, Oracle(right, depth=2, lie=99), Continues(), Agrees(), tokens=20)
    assert out[0].tolist() == answer(20)
    assert set(model.stats.accepted["agrees"]) == {2}  # the root is nobody's


class Hanging:
    """One row below every node, with the embedding of token 5."""

    name = "hangs"

    def __init__(self, model):
        self.row = model.get_input_embeddings().weight[5:6].detach()

    @hookimpl
    def append(self, tree):
        nodes = np.arange(len(tree))
        return Appended(self.row, nodes * 0, nodes, nodes, np.ones(len(tree)))


def test_hook_append():
    class Hangs(Hanging):
        """Its answer is what the model says after the token."""

        def __init__(self, model):
            super().__init__(model)
            self.answers = []

        @hookimpl
        def observe(self, step):
            if step.index > 1:  # the prefill carries no rows
                self.answers.append((list(step.ids), step.answers[self].logits))

    base = tiny()
    hangs = Hangs(base)
    run(base, Oracle(answer()), hangs)
    assert len(hangs.answers) > 2
    for ids, logits in hangs.answers[:-2]:  # near the end there is no room for a row below the last token
        expected = base(torch.tensor([[*ids[:-1], 5]])).logits[0, -1]
        torch.testing.assert_close(logits[0], expected)


def test_how_many_candidates_are_worth_proposing():
    def worth(most, rows):
        return Step([1], VOCAB, Budget.flat(most), 9, rows=rows).candidates

    assert [worth(64, rows) for rows in (0, 1, 8, 9, 16, 64)] == [32, 32, 32, 36, 64, 64]
    assert [worth(16, rows) for rows in (0, 16)] == [16, 16]


def test_hook_refine():
    """An answer that its drafter finds, with the hidden states that were asked for."""
    base = tiny()

    class Reads(Hanging):
        told = 0

        @hookimpl
        def propose(self, step):
            answer = step.answers.get(self)
            if answer is None or not len(answer.kinds):
                return None
            self.told += 1
            assert answer.logits.tolist() == [[1.0, 2.0]]
            return TokenTree.chain(step.ids[-1], [7], [-1.0])

    class Refines:
        @hookimpl
        def hidden_layers(self, model):
            return [3]

        @hookimpl
        def refine(self, step, drafter, answer):
            assert drafter is reads
            expected = base.model(torch.tensor([[*step.ids[:-1], 5]])).last_hidden_state[0, -1]
            torch.testing.assert_close(answer.hidden_states[3][0], expected)
            torch.testing.assert_close(answer.logits[0], base.lm_head(expected))
            return replace(answer, logits=torch.tensor([[1.0, 2.0]]))

    reads = Reads(base)
    model, ids = run(base, reads, plugins=[Refines()])
    assert reads.told > 2
    assert ids[0].tolist() == answer(12)
    assert model.stats.seconds["refine hangs"] > 0


class Foretells:
    """Hangs a row below each other node, and wants to know all that can be foretold."""

    def __init__(self, model):
        self.row = model.get_input_embeddings().weight[5:6].detach()
        self.same, self.missed = 0, 0

    @hookimpl
    def hidden_layers(self):
        return [2, 3]

    @hookimpl
    def append(self, tree):
        nodes = np.arange(0, len(tree), 2)
        return Appended(self.row, nodes * 0, nodes, nodes, np.ones(len(nodes)))

    @hookimpl
    def foretell(self, logits, reached, answers):
        mine = answers.get(self)
        below = [] if mine is None else [mine.logits, mine.hidden_states[3]]
        flags = logits[:, :3] > 0  # of one byte each, so that what follows begins anywhere
        return [flags, reached.root, reached.hidden_states[2], reached.hidden_states[3], logits, *below]

    @hookimpl
    def observe(self, step, logits):
        if step.index < 2:
            return
        if self not in step.foretold:
            self.missed += 1
            return
        flags, root, second, third, told, *below = step.foretold[self]
        assert root.tolist() == step.ids[-1:]
        states = {layer: state.cpu() for layer, state in step.hidden_states.items()}
        expected = [(logits[:, :3] > 0).cpu(), states[2][-1:], states[3][-1:], logits.cpu()]
        assert all(map(torch.equal, [flags, second, third, told], expected))
        if self in step.answers and len(step.answers[self].kinds):
            mine = step.answers[self]
            assert torch.equal(below[0], mine.logits.cpu())
            assert torch.equal(below[1], mine.hidden_states[3].cpu())
            self.same += 1


@pytest.fixture
def there(monkeypatch):
    if not simulated.HERE:
        pytest.skip("this torch knows no devices in Python")
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    with Simulated():
        yield


@pytest.mark.usefixtures("there")
def test_hook_foretell():
    """On a device what is foretold is what comes; of draws nothing is."""
    ids, base = prompt(), tiny(dtype=torch.float32)
    expected = base.generate(ids, max_new_tokens=30, do_sample=False)
    moved = tiny(dtype=torch.float32).to(KIND)
    foretells = Foretells(moved)
    oracle = Oracle(expected[0].tolist(), lie=2)
    model = compose(moved, oracle, foretells, budget=24)
    assert torch.equal(model.generate(ids.to(KIND), max_new_tokens=30, do_sample=False).cpu(), expected)
    assert foretells.same > 3
    assert foretells.missed <= 1  # the last step may end within its path
    sampled = {"do_sample": True, "top_k": 5}
    torch.manual_seed(0)
    expected = base.generate(ids, max_new_tokens=12, **sampled)
    torch.manual_seed(0)
    before = foretells.same
    assert torch.equal(model.generate(ids.to(KIND), max_new_tokens=12, **sampled).cpu(), expected)
    assert foretells.same == before


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("wrong", [torch.zeros(2), [3], "nothing"])
def test_nonsense_that_was_foretold(wrong):
    class Nonsense(Oracle):
        @hookimpl
        def foretell(self):
            return wrong

    base = tiny(dtype=torch.float32).to(KIND)
    with pytest.raises(MalformedDraft, match=r"foretell, of drafter 'oracle',.* expected tensors or None, got"):
        compose(base, Nonsense([])).generate(prompt().to(KIND), max_new_tokens=5, do_sample=False)


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        (lambda answer: answer.logits, "expected an Answer or None, got Tensor"),
        (lambda answer: replace(answer, logits=answer.logits[0]), r"logits must be a Tensor \[rows, entries\], got"),
        (lambda answer: replace(answer, logits=None), r"logits must be a Tensor \[rows, entries\], got None"),
        (lambda answer: replace(answer, logits=answer.logits[:0]), "1 kinds of 0 rows"),
        (lambda answer: replace(answer, tokens=torch.zeros(2, dtype=torch.long)), "2 tokens for 61 entries"),
    ],
)
def test_an_answer_that_was_refined_to_nonsense(wrong, fault):
    class Refines:
        @hookimpl
        def refine(self, answer):
            return wrong(answer)

    base = tiny()
    with pytest.raises(MalformedDraft, match=f"refine, for drafter 'hangs', returned a malformed draft: {fault}"):
        run(base, Hanging(base), plugins=[Refines()])


def test_answers_are_gone_before_the_next_forward():
    """Its logits and the last one's are a good part of what a generation needs of memory."""
    told, left = [], []

    class Watches(Hanging):
        @hookimpl(tryfirst=True)
        def accept(self, step):
            left.append(list(step.answers))

        @hookimpl
        def observe(self, step):
            told.append(len(step.answers))

    run(tiny(), Watches(tiny()))
    assert sum(told) > 2
    assert not any(left)


def test_what_was_known_of_the_prompt_is_gone_once_it_was_told():
    class Reads:
        @hookimpl
        def hidden_layers(self, model):
            return [1]

        @hookimpl
        def start(self, step):
            self.told = ref(step.hidden_states[1])

        @hookimpl
        def observe(self, step):
            self.left = self.told() is not None

    reads = Reads()
    run(None, Oracle(answer()), reads)
    assert not reads.left


def test_a_guess_that_claims_nothing_at_all_is_one():
    class Never(Oracle):
        name = "never"

        @hookimpl
        def propose(self, step):
            tree = super().propose(step)
            return tree and replace(tree, log_probs=np.where(tree.parents < 0, 0.0, -np.inf))

    for plugins in ([], [HighestClaim()]):
        _, out = run(None, Never(answer()), TokenRecycling(), plugins=plugins)
        assert out[0].tolist() == answer(12)


def test_hook_prefix():
    """Rows of the drafter that has it see it, and nobody else does: its own values decide what they answer."""

    class Hangs(Hanging):
        def __init__(self, model, prefix):
            super().__init__(model)
            self.states, self.told = prefix, []

        @hookimpl
        def prefix(self):
            return self.states

        @hookimpl
        def observe(self, step):
            self.told += [answer.logits[:1] for answer in step.answers.values() if len(answer.kinds)]

    without, other = Hangs(tiny(), None), Hangs(tiny(), torch.ones(3, 2, 2, 1, 8))
    for hangs in (without, other):
        _, out = run(tiny(), Oracle(answer()), hangs)
        assert out[0].tolist() == answer(12)
    assert len(without.told) == len(other.told) > 1
    assert not any(torch.allclose(*pair) for pair in zip(without.told, other.told, strict=True))


@pytest.mark.parametrize("told", [torch.zeros(3, 2, 2, 8), "all", torch.zeros(3, 2, 2, 1, 8, dtype=torch.long)])
def test_a_malformed_prefix_names_the_drafter(told):
    class Wrong:
        name = "wrong"

        @hookimpl
        def prefix(self):
            return told

    with pytest.raises(MalformedDraft, match="'wrong' returned a malformed draft"):
        run(tiny(), Wrong())


def test_hook_fit():
    class Two:
        @hookimpl
        def fit(self, tree, appended):
            return tree.take(np.arange(min(2, len(tree)))), [rows.take(array(), array(0), 1) for rows in appended]

    model, out = run(None, Oracle(answer()), plugins=[Two()])
    assert out[0].tolist() == answer(12)
    assert model.stats.rows_per_forward <= 2


def test_hook_accept():
    class Never:
        """Rejects everything: the root alone."""

        @hookimpl
        def accept(self, pick):
            return [(0, pick(0))]

    model, out = run(None, Oracle(answer()), plugins=[Never()])
    assert out[0].tolist() == answer(12)
    assert model.stats.forwards == 12


def test_hook_observe():
    class Watches:
        def __init__(self):
            self.tokens = []

        @hookimpl
        def observe(self, step):
            assert step.tree.tokens[step.path].tolist() == step.ids[-len(step.path) - 1 : -1]
            self.tokens += step.ids[-len(step.path) :]

    watches = Watches()
    _, out = run(None, Oracle(answer()), plugins=[watches])
    assert watches.tokens == out[0, 12:].tolist()


def bare(step, **changes):
    fields = {"tokens": array(step.ids[-1], 3), "parents": array(-1, 0), "log_probs": np.asarray([0.0, -1.0])}
    fields = {**fields, **changes}
    return TokenTree(**fields, sources=np.zeros(len(fields["tokens"]), np.int64))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda s: "three", "expected a TokenTree or None, got str"),
        (lambda s: bare(s, tokens=[1, 2]), "tokens must be a flat array of integers"),
        (lambda s: bare(s, parents=array(-1)), "arrays of different or no length"),
        (lambda s: bare(s, tokens=array((s.ids[-1] + 1) % VOCAB, 3)), "row 0 must be the root"),
        (lambda s: bare(s, parents=array(-1, 1)), "a parent must come before its children"),
        (lambda s: bare(s, parents=array(-1, -1)), "a parent must come before its children"),
        (lambda s: bare(s, tokens=array(s.ids[-1], VOCAB)), "outside the vocabulary of 61"),
        (lambda s: bare(s, log_probs=np.asarray([0.0, np.nan])), "it must be a number of at most 0"),
        (lambda s: bare(s, log_probs=np.asarray([-1.0, -0.5])), "claims more than its parent"),
        (lambda s: TokenTree.of([s.ids[-1], 3, 3], [-1, 0, 0], [0, -1, -1]), "two children of one node"),
    ],
)
def test_a_malformed_tree_names_the_drafter_and_the_fault(fault, message):
    base = tiny()
    with pytest.raises(MalformedDraft, match=message) as raised:
        run(base, Returns(fault, name="clumsy"))
    assert "drafter 'clumsy'" in str(raised.value)
    assert len(base.generate(prompt(), max_new_tokens=3, do_sample=False)[0]) == 15


def test_a_merge_that_returns_no_tree_is_named():
    class Reversed:
        @hookimpl
        def merge(self, trees):
            return replace(trees[-1], parents=trees[-1].parents[::-1])

    with pytest.raises(MalformedDraft, match=r"^merge returned a malformed draft: row 0 must be the root"):
        run(None, Oracle(answer()), plugins=[Reversed()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parents": array(9)}, "must hang from a tree node"),
        ({"nodes": array(4)}, "must name the tree node that its chain hangs from"),
        (
            {"parents": array(0, 1), "nodes": array(0, 1), "kinds": array(0, 0), "gains": np.ones(2)},
            "must name the tree node that its chain hangs from",
        ),
        ({"kinds": array(1)}, "kinds must index the 1 embeddings"),
        ({"gains": np.asarray([np.nan])}, "gains must be numbers"),
        ({"gains": np.asarray([1.0, 2.0])}, "different lengths"),
        ({"kinds": [0]}, r"kinds must be a flat array of integers, got \[0\]"),
        ({"gains": array(1)}, "gains must be a flat array of floats"),
        ({"embeddings": torch.zeros(1, 1, 32)}, r"embeddings must be a Tensor \[kinds, hidden\]"),
    ],
)
def test_malformed_appended_rows_name_the_drafter_and_the_fault(change, message):
    class Hangs:
        name = "clumsy"

        @hookimpl
        def append(self):
            fields = {"kinds": array(0), "parents": array(0), "nodes": array(0), "gains": np.ones(1)}
            return Appended(**{"embeddings": torch.zeros(1, 32), **fields, **change})

    with pytest.raises(MalformedDraft, match=f"'clumsy'.*{message}"):
        run(None, Hangs())


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (torch.zeros(1, 16), "embeddings must be 32 wide, as the model's are, got 16"),
        (torch.full((1, 32), math.nan), "embeddings hold NaN or values beyond"),
        (torch.full((1, 32), 1e30), "embeddings hold NaN or values beyond"),
    ],
)
def test_appended_embeddings_that_a_forward_cannot_take_name_the_drafter(embeddings, message):
    class Hangs:
        name = "clumsy"

        def __init__(self):
            self.row = torch.zeros(1, 32, dtype=torch.float64)

        @hookimpl
        def append(self, step):
            if step.index == 3:
                self.row = embeddings.double()
            return Appended(self.row, array(0), array(0), array(0), np.ones(1))

    with pytest.raises(MalformedDraft, match=f"'clumsy'.*{message}"):
        run(None, Hangs())


def _no_pair(tree, appended):
    return tree


def _no_rows(tree, appended):
    return tree, []


def _no_root(tree, appended):
    return replace(tree, tokens=tree.tokens + 1), appended


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (_no_pair, "expected a tree and the appended rows, got TokenTree"),
        (_no_rows, "the rows of 1 drafters must come back"),
        (_no_root, "row 0 must be the root"),
    ],
)
def test_a_fit_that_returns_something_else_is_named(returned, message):
    class Fits:
        @hookimpl
        def fit(self, tree, appended):
            return returned(tree, appended)

    with pytest.raises(MalformedDraft, match=f"^fit returned a malformed draft: {message}"):
        run(None, prompt_tokens(), plugins=[Fits()])


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "at least the root"),
        ([(0, 99)], "token 99 is outside the vocabulary of 61"),
        ([(0, 5), (0, 5)], "node 0 does not follow"),
        ([(1, 5)], "node 1 does not follow"),
    ],
)
def test_an_accept_that_returns_no_path_is_named(pairs, message):
    class Accepts:
        @hookimpl
        def accept(self):
            return pairs

    with pytest.raises(MalformedDraft, match=f"^accept returned a malformed draft: {message}"):
        run(None, Oracle(answer()), plugins=[Accepts()])


@pytest.mark.parametrize("hook", ["propose", "extend", "append", "prefix"])
def test_a_plugin_that_drafts_is_told_to_be_a_drafter(hook):
    drafts = type("Drafts", (), {"name": "drafts", hook: hookimpl(lambda self: None)})()
    with pytest.raises(TypeError, match=f"'drafts' drafts, by its {hook}: give it to compose"):
        compose(tiny(), plugins=[drafts], budget=8)
    compose(tiny(), drafts, budget=8)


def test_a_misspelt_hook_and_a_wrong_argument_fail_at_compose():
    class Misspelt:
        @hookimpl
        def propsoe(self, step):
            return None

    class Wrong:
        @hookimpl
        def propose(self, steps):
            return None

    class Unmarked(Oracle):
        def observe(self, step):
            pass

    with pytest.raises(TypeError, match="propsoe"):
        compose(tiny(), Misspelt())
    with pytest.raises(TypeError, match=r"'oracle' has a method observe, which is a hook's name.*mark it"):
        compose(tiny(), Unmarked([1, 2, 3]))
    with pytest.raises(TypeError, match="steps"):
        compose(tiny(), Wrong())
    with pytest.raises(TypeError, match="implements no hook"):
        compose(tiny(), object())
    with pytest.raises(TypeError, match="is a class"):
        compose(tiny(), Oracle)
    twice = prompt_tokens()
    with pytest.raises(ValueError, match="given twice"):
        compose(tiny(), twice, twice)


def test_two_drafters_of_one_name_need_another_name():
    first, second = prompt_tokens(seed=1), prompt_tokens(seed=2)
    with pytest.raises(ValueError, match="two plugins are named 'ppd': set the `name`"):
        compose(tiny(), first, second)
    second.name = "ppd-other"
    model = compose(tiny(), first, second, budget=16)
    assert list(model.plugins.drafters) == ["ppd", "ppd-other"]


@pytest.mark.parametrize("place", ["extend", "append"])
def test_the_tree_that_drafters_are_shown_is_not_theirs_to_change(place):
    class Meddler:
        name = "meddler"

        @hookimpl
        def start(self, step):
            step.memory[self] = 0

    def meddle(self, step, tree):
        with pytest.raises(ValueError, match="read-only"):
            tree.tokens[0] = (tree.tokens[0] + 1) % VOCAB
        step.memory[self] += 1
        seen.append(1)

    seen, base = [], tiny()
    setattr(Meddler, place, hookimpl(meddle))
    model = compose(base, Meddler(), TokenRecycling(), budget=8)
    expected = base.generate(prompt(), max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(prompt(), max_new_tokens=12, do_sample=False), expected)
    assert seen


def test_a_drafter_may_write_each_tree_where_the_one_before_stood():
    class Thrifty:
        name = "thrifty"

        def __init__(self, ids):
            self.ids, self.tree = ids, TokenTree.of([0] * 3, [-1, 0, 1], [0.0, -0.1, -0.2])

        @hookimpl
        def propose(self, step):
            ahead = self.ids[step.length - 1 : step.length + 2]
            self.tree.tokens[:] = ahead if len(ahead) == 3 else [step.ids[-1]] * 3
            return self.tree

    base = tiny()
    expected = base.generate(prompt(), max_new_tokens=24, do_sample=False)
    model = compose(base, Thrifty(expected[0].tolist()), budget=8)
    assert torch.equal(model.generate(prompt(), max_new_tokens=24, do_sample=False), expected)
    (accepted,) = model.stats.accepted.values()
    assert sum(accepted.values()) > 12
