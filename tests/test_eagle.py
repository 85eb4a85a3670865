"""EAGLE heads at work: the official code's logits and trees, losslessness, the draft's KV cache, growing, composing."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ppd_compose.integrations.eagle import EagleHead
from ppd_compose.integrations.eagle.borrowed import Parts, borrow
from ppd_compose.integrations.eagle.config import EagleConfig, default_layers
from ppd_compose.integrations.eagle.draft_cache import DraftCache
from ppd_compose.integrations.eagle.files import read_head
from ppd_compose.integrations.eagle.grow import ROOT, Frontier, dynamic_tree, levels_below
from ppd_compose.integrations.eagle.head import Head
from ppd_compose.integrations.eagle.levels import LevelPrice, Levels
from ppd_compose.integrations.eagle.network import DraftNetwork
from ppd_compose.integrations.eagle.rows import DraftRows
from safetensors.torch import load_file
from tiny import VOCAB, Oracle, continuing, prompt, prompt_tokens, tiny

from ppd_compose import Budget, Step, TokenTree, compose, hookimpl
from ppd_compose.alternatives import AlwaysAsk
from ppd_compose.finish import OutputHead
from ppd_compose.identity import Identity
from ppd_compose.lineage import ancestors, row_depths
from ppd_compose.testing import check_drafter

FIXTURES = Path(__file__).parent / "fixtures"
LAYER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


def random_head(version=3, *, seed=0, draft=40, layer=LAYER, own=(), **settings):
    """A head of random weights for the bases of `tiny`; `own` of "embedding" and "lm_head" it brings itself."""
    draft, states = (draft, 3) if version == 3 else (VOCAB, 1)
    fields = {"vocab_size": VOCAB, "draft_vocab_size": draft, "state_size": 32, "states": states, **settings}
    config = EagleConfig(version, layer, **fields)
    torch.manual_seed(seed)
    with torch.no_grad():
        weights = {
            name: torch.randn_like(w) * 0.3 if w.ndim > 1 else torch.rand_like(w) + 0.5
            for name, w in DraftNetwork(config).state_dict().items()
        }
    ids = None if draft == VOCAB else torch.randperm(VOCAB)[:draft].sort().values
    shapes = {"embedding": (VOCAB, config.hidden_size), "lm_head": (draft, config.hidden_size)}
    return Head(config, weights, target_ids=ids, **{name: torch.randn(shapes[name]) * 0.3 for name in own})


def eagle(version=3, *, depth=3, top_k=4, grow=0, **settings):
    return EagleHead(random_head(version, **settings), depth=depth, top_k=top_k, grow=grow)


class Recorder(OutputHead):
    """An output head that keeps its logits."""

    def __call__(self, hidden):
        logits = super().__call__(hidden)
        self.told.append(logits)
        return logits


@pytest.mark.parametrize("version", [1, 3])
def test_logits_and_trees_are_those_of_the_official_code(version):
    """Three steps of one sequence with the draft's KV cache; see fixtures/eagle_oracle.py."""
    head = read_head(FIXTURES / f"eagle-{version}")
    assert head.config.version == version
    told = load_file(FIXTURES / f"eagle-{version}" / "trace.safetensors")
    output = Recorder(told["head"] if version == 1 else head.lm_head)
    object.__setattr__(output, "told", [])
    network = DraftNetwork.of(head.config, head.network)
    embed = torch.nn.Embedding.from_pretrained(head.embedding)
    rows = DraftRows(DraftCache(Parts(network, embed, output, head.target_ids)), 0)
    end = 0
    for step, count in enumerate((9, 3, 1)):
        states, ids = told["states"][end : end + count], told["ids"][: end + count + 1].tolist()
        end += count
        with torch.no_grad():
            rows.learn(states.chunk(head.config.states, dim=-1))
            below = levels_below(rows, Frontier.root(rows.accept(ids)), 4)
            tree = dynamic_tree(TokenTree.chain(ids[-1]), ROOT, below, Levels(3), 19)
        logits = torch.cat(output.told)
        torch.testing.assert_close(logits, told[f"{step}.logits"][: len(logits)], rtol=1e-5, atol=1e-5)
        assert len(logits) >= 5
        assert tree.tokens.tolist() == told[f"{step}.tokens"].tolist()
        assert np.array_equal(ancestors(tree.parents), told[f"{step}.see"].numpy())
        output.told.clear()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "qwen3", "mixtral"])
@pytest.mark.parametrize("version", [1, 3])
def test_the_tokens_are_those_of_generate_alone_and_with_prompt_tokens(family, version):
    base = tiny(family)
    expected = base.generate(prompt(), max_new_tokens=40, do_sample=False)
    for others in ([], [prompt_tokens()]):
        model = compose(base, eagle(version, grow=2), *others, budget=24)
        assert torch.equal(model.generate(prompt(), max_new_tokens=40, do_sample=False), expected)
        assert model.stats.forwards <= 40


@pytest.mark.parametrize(("family", "version"), [("gpt2", 1), ("llama", 3)])
def test_eagle_passes_the_checks_of_every_drafter(family, version):
    base = tiny(family)
    base(prompt(), output_hidden_states=True)  # the first time transformers puts hooks of its own on a model
    check_drafter(lambda base: eagle(version, grow=1), base)


class Watched(EagleHead):
    """Keeps what it proposed, and for which text."""

    @hookimpl
    def propose(self, step):
        tree = super().propose(step)
        self.told.append((list(step.ids), tree))
        return tree


def watched(version, **settings):
    drafter = Watched(random_head(version), depth=3, top_k=4, **settings)
    drafter.told = []
    return drafter


def fresh_tree(head, base, ids):
    """What a new drafter proposes that is given all of `ids` but the root as a prompt."""
    drafter = EagleHead(head, depth=3, top_k=4)
    layers = drafter.hidden_layers(base)
    with torch.no_grad():
        states = base(torch.tensor([ids[:-1]]), output_hidden_states=True).hidden_states
        step = Step(ids[:-1], VOCAB, Budget.flat(24), 100, hidden_states={layer: states[layer][0] for layer in layers})
        drafter.start(step, base)
        step.ids = ids
        return drafter.propose(step)


def assert_same_tree(mine, other):
    assert mine.tokens.tolist() == other.tokens.tolist()
    assert mine.parents.tolist() == other.parents.tolist()
    np.testing.assert_allclose(mine.log_probs, other.log_probs, atol=1e-4)


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("version", [1, 3])
def test_the_draft_cache_keeps_step_with_what_was_accepted(version, chunk):
    """After any acceptances the tree is that of a new drafter that sees the whole text at once."""
    base, drafter = tiny(), watched(version, grow=2)
    right = base.generate(prompt(), max_new_tokens=40, do_sample=False)
    model = compose(base, Oracle(right[0].tolist()), drafter, budget=24)
    out = model.generate(prompt(), max_new_tokens=40, do_sample=False, prefill_chunk_size=chunk)
    assert torch.equal(out, right)
    lengths = [len(ids) for ids, _ in drafter.told]
    assert len(set(np.diff(lengths))) > 1  # paths of several lengths were accepted
    for ids, tree in drafter.told[:-3]:  # near the end there is no room for deep candidates
        assert_same_tree(tree, fresh_tree(drafter.head, base, ids))


@pytest.mark.parametrize("version", [1, 3])
def test_a_chat_goes_on_from_the_returned_cache(version):
    """Of the tokens that are cached the states are not known: fewer pairs, the same tokens."""
    base, drafter = tiny(), watched(version)
    model = compose(base, drafter, budget=24)
    turn = model.generate(prompt(), max_new_tokens=15, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([turn.sequences, prompt(6, seed=3)], dim=1)
    settings = {"attention_mask": torch.ones_like(longer), "max_new_tokens": 15, "do_sample": False}
    expected = base.generate(longer, **settings)
    assert torch.equal(model.generate(longer, **continuing(turn), **settings), expected)
    assert len(drafter.told) > 15


@pytest.mark.parametrize("budget", [1, 2, 3, 9])
def test_a_draft_has_no_more_rows_than_the_budget_and_no_node_beyond_the_room(budget):
    base, drafter = tiny(), watched(3)
    compose(base, drafter, budget=budget).generate(prompt(), max_new_tokens=9, do_sample=False)
    trees = [(len(ids), tree) for ids, tree in drafter.told if tree is not None]
    assert bool(trees) == (budget > 1)
    for length, tree in trees:
        assert len(tree) <= budget
        assert row_depths(tree.parents).max() < 12 + 9 - length


def test_the_surest_of_all_candidates_are_drafted():
    """Against every path of the draft, each scored by a run of its own."""
    base, head = tiny(), random_head(3, draft=12)
    ids = prompt(9)[0].tolist()
    drafter = EagleHead(head, depth=2, top_k=12)
    wide = EagleHead(head, depth=2, top_k=12)
    with torch.no_grad():
        states = base(torch.tensor([ids[:-1]]), output_hidden_states=True).hidden_states
        told = {}
        for size, maker in ((30, drafter), (12 + 144 + 144 + 1, wide)):
            step = Step(ids[:-1], VOCAB, Budget.flat(size), 100, hidden_states={i: states[i][0] for i in (1, 2)})
            maker.start(step, base)
            step.ids = ids
            told[size] = maker.propose(step)
    small, whole = told.values()
    best = np.sort(whole.log_probs)[::-1][:30]
    np.testing.assert_allclose(np.sort(small.log_probs)[::-1], best, atol=1e-6)
    shares = np.exp(whole.log_probs[whole.parents == 0])
    assert abs(shares.sum() - 1) < 1e-5  # claims over the draft vocabulary
    assert set(small.tokens[1:].tolist()) <= set(head.target_ids.tolist())


CURVE = np.linspace(1.0, 2.0, 51)  # a row costs a fiftieth of plain decoding's token


@pytest.mark.parametrize(
    ("seconds", "chances", "runs"), [(0.1, [0.3, 0.02], True), (0.1, [0.08, 0.05], False), (0.3, [0.3, 0.02], False)]
)
def test_a_level_is_run_where_what_it_can_add_pays_for_it(seconds, chances, runs):
    price = LevelPrice([5.0, *[seconds] * 7])  # the first draft of a process is slow
    levels = price.levels(1, CURVE)
    scores = np.log(chances)
    assert levels.another(scores) == runs
    assert not levels.another(scores)


def test_a_head_that_is_never_asked_keeps_little_of_a_long_answer():
    parts, states = borrow(random_head(3), tiny(dtype=torch.float32)), [torch.randn(200, 32) for _ in range(3)]
    ids = [step % VOCAB for step in range(201)]
    seldom, often = DraftRows(DraftCache(parts), 0), DraftRows(DraftCache(parts), 0)
    with torch.no_grad():
        for at in range(200):
            seldom.learn([state[at : at + 1] for state in states])
            often.learn([state[at : at + 1] for state in states])
            told = often.accept(ids[: at + 2])
            assert len(seldom.pending) < 64
        torch.testing.assert_close(seldom.accept(ids).hidden, told.hidden)


def test_a_level_must_earn_what_its_seconds_make_elsewhere():
    price, scores = LevelPrice([0.1] * 8), np.log([0.3, 0.02])
    assert price.levels(1, CURVE, rate=2.0).another(scores)
    assert not price.levels(1, CURVE, rate=4.0).another(scores)
    assert price.levels(1, CURVE, rate=0.1).another(scores)  # no less than plain decoding makes


def test_with_a_fixed_number_of_rows_every_level_is_run():
    levels = LevelPrice([100.0] * 8).levels(3, None)
    assert [levels.another(np.array([-20.0])) for _ in range(4)] == [True, True, True, False]
    assert levels.all_made


def test_where_rows_cost_nothing_a_level_still_does():
    price = LevelPrice([100.0] * 8)
    assert not price.levels(3, np.ones(64)).another(np.array([-20.0]))


def test_levels_are_timed_in_the_first_drafts_and_then_settled():
    price = LevelPrice()
    for number in range(20):
        levels = price.levels(2, CURVE)
        assert (levels.level_price > 0) == (number >= 8)
        price.book(levels)  # nothing to tell of levels that were not run
        levels.made, levels.begin = 2, time.perf_counter() - 6.0
        price.book(levels)
    assert len(price.seconds) == 16
    assert price.levels(2, CURVE).level_price == pytest.approx(3.0, rel=0.01)


def test_on_a_device_one_level_more_is_run_than_was_wanted_of_late():
    for wanted, most, run in (([], 5, 5), ([0, 0], 5, 1), ([1, 3, 2], 5, 4), ([4], 5, 5), ([0], 0, 0), ([2], 1, 4)):
        levels = Levels(most)
        depth = 5 if most else 0
        assert levels.run_ahead(depth, wanted) == run
        assert levels.most == min(most, run)
    price = LevelPrice()
    for depth in (0, 1):  # what comes before levels takes as long as one, and tells nothing of them alone
        levels = Levels(depth)
        levels.run_ahead(depth, [])
        levels.begin -= 6.0
        price.book(levels)
    assert price.seconds == pytest.approx([3.0], rel=0.01)


def test_drafts_end_where_forwards_are_cheap_beside_them():
    base = tiny()
    budgets = [Budget((1, 24), (0,), ((seconds, 1.01 * seconds),)) for seconds in (1e-6, 1e3)]
    expected = base.generate(prompt(), max_new_tokens=40, do_sample=False)
    depths = []
    for budget in budgets:
        drafter = watched(3)
        model = compose(base, drafter, budget=budget, plugins=[AlwaysAsk()])
        assert torch.equal(model.generate(prompt(), max_new_tokens=40, do_sample=False), expected)
        depths.append([int(row_depths(tree.parents).max()) for _, tree in drafter.told[9:-6] if tree is not None])
    assert max(depths[0]) == 1
    assert min(depths[1]) > 1


def test_leaves_of_other_drafters_are_grown_and_credited():
    base = tiny()
    right = base.generate(prompt(), max_new_tokens=60, do_sample=False)
    drafter = eagle(3, draft=VOCAB, grow=3, depth=1)
    grown = []

    class Watch:
        @hookimpl(wrapper=True)
        def extend(self, step, tree):
            made = yield
            grown.extend((tree, more) for more in made)
            return made

    model = compose(base, Oracle(right[0].tolist(), depth=3), drafter, budget=48, plugins=[Watch()])
    assert torch.equal(model.generate(prompt(), max_new_tokens=60, do_sample=False), right)
    assert grown
    for tree, more in grown:
        beyond = more.marked_beyond(tree, 1).sources
        assert beyond.any()
        assert np.all(more.log_probs[1:] <= more.log_probs[more.parents[1:]])
    assert max(model.stats.accepted["eagle"]) > 3  # below the oracle's three
    without = compose(base, Oracle(right[0].tolist(), depth=3), eagle(3, draft=VOCAB, depth=1), budget=48)
    without.generate(prompt(), max_new_tokens=60, do_sample=False)
    assert max(without.stats.accepted["eagle"], default=0) <= 2


def test_a_grown_leaf_is_continued_as_if_its_path_were_text():
    base, drafter = tiny(), eagle(3, grow=1, depth=0)
    ids, path = prompt(9)[0].tolist(), [7, 9, 3]
    with torch.no_grad():
        states = base(torch.tensor([ids[:-1]]), output_hidden_states=True).hidden_states
        step = Step(ids[:-1], VOCAB, Budget.flat(24), 100, hidden_states={i: states[i][0] for i in (1, 2)})
        drafter.start(step, base)
        step.ids = ids
        drafter.propose(step)
        more = drafter.extend(step, TokenTree.chain(ids[-1], path, [-0.1] * 3))
        # The same pairs as one causal run: features of the base, then the draft's own.
        parts = step.memory[drafter].rows.parts
        features = parts.network.fuse([states[i][0].double() for i in (1, 1, 2)])
        tokens = [*ids[1:], *path]
        for at in range(3):
            known = len(ids) - 1 + at + 1
            rows = parts.network.rows(parts.embed(torch.tensor(tokens[: known - 1])), features)
            rope = parts.network.rope(torch.arange(known - 1), features)
            see = torch.ones(known - 1, known - 1).tril().bool()
            out = parts.network(rows, rope, *parts.network.remember(rows, rope), see)
            features = torch.cat([features, out.feature[-1:]])
        rows = parts.network.rows(parts.embed(torch.tensor(tokens)), features)
        rope = parts.network.rope(torch.arange(len(tokens)), features)
        see = torch.ones(len(tokens), len(tokens)).tril().bool()
        last = parts.network(rows, rope, *parts.network.remember(rows, rope), see).hidden[-1:]
        log_probs = parts.output(last)[0].log_softmax(-1)
    assert more.tokens[:4].tolist() == [ids[-1], *path]
    best = log_probs.topk(4)
    assert more.tokens[4:].tolist() == parts.target_ids[best.indices].tolist()
    np.testing.assert_allclose(more.log_probs[4:], -0.3 + best.values.numpy(), atol=1e-5)
    assert drafter.extend(step, step.memory[drafter].tree) is None  # all of it is its own


def test_nothing_is_grown_unless_asked():
    base = tiny()
    right = base.generate(prompt(), max_new_tokens=20, do_sample=False)[0].tolist()
    calls = []

    class Watch:
        @hookimpl(wrapper=True)
        def extend(self, step, tree):
            made = yield
            calls.append(made)
            return made

    model = compose(base, Oracle(right), eagle(3), budget=24, plugins=[Watch()])
    model.generate(prompt(), max_new_tokens=20, do_sample=False)
    assert calls
    assert not any(calls)


@pytest.mark.parametrize("own", [(), ("embedding",), ("lm_head",), ("embedding", "lm_head")])
def test_heads_with_and_without_an_embedding_and_output_head(own):
    base = tiny()
    model = compose(base, eagle(3, own=own), budget=24)
    expected = base.generate(prompt(), max_new_tokens=20, do_sample=False)
    assert torch.equal(model.generate(prompt(), max_new_tokens=20, do_sample=False), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"biases": frozenset({"fc", "qkv", "o", "mlp"})},
        {"qk_norm": True},
        {"norm_before_residual": True},
        {"norm_before_fc": True},
        {"fc_norm": True, "norm_output": True},
        {"layer": {**LAYER, "head_dim": 12}},
        {"layer": {**LAYER, "hidden_size": 24}, "own": ("embedding", "lm_head")},
        {"layer": {**LAYER, "hidden_act": "gelu", "rope_theta": 77.0}},
        {"layers": (0, 1), "states": 2},
        *(
            {"layer": {**LAYER, "max_position_embeddings": 16, "rope_scaling": {"rope_type": kind, **more}}}
            for kind, more in {
                "linear": {"factor": 2.0},
                "dynamic": {"factor": 2.0},
                "yarn": {"factor": 2.0, "original_max_position_embeddings": 8},
                "longrope": {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0,
                             "original_max_position_embeddings": 8},
                "llama3": {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                           "original_max_position_embeddings": 8},
            }.items()
        ),
    ],
    ids=lambda settings: "-".join(map(str, settings)),
)  # fmt: skip
def test_every_kind_of_layer_drafts(settings):
    base = tiny()
    model = compose(base, EagleHead(random_head(3, **settings), depth=2, top_k=3), budget=16)
    expected = base.generate(prompt(), max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(prompt(), max_new_tokens=12, do_sample=False), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_runs_in_the_dtype_of_the_base_whatever_its_own(dtype):
    base, head = tiny(dtype=dtype), random_head(3)
    drafter = EagleHead(head, depth=3, top_k=4)
    model = compose(base, drafter, budget=24)
    model.generate(prompt(), max_new_tokens=8, do_sample=False)
    _, lending = next(iter(drafter._lendings.by_model.values()))
    assert {p.dtype for p in lending.free[0].parts.network.parameters()} == {dtype}
    assert all(tensor.dtype == torch.float32 for tensor in head.network.values())
    again = compose(base, drafter, budget=24)
    again.generate(prompt(), max_new_tokens=4, do_sample=False)
    assert len(drafter._lendings.by_model) == 2
    (kept,) = drafter._lendings.by_model[again][1].free
    again.generate(prompt(), max_new_tokens=4, do_sample=False)
    assert drafter._lendings.by_model[again][1].free == [kept]  # its rows of the output head are gathered once


def test_what_the_base_does_to_its_logits_is_done_to_the_drafts():
    base = tiny("gemma2", attention="eager")
    hidden = torch.randn(3, 32, dtype=torch.float64)
    output = OutputHead.of(base, torch.tensor([5, 9]))
    cap = base.config.final_logit_softcapping
    expected = torch.tanh(hidden @ base.lm_head.weight.T / cap) * cap
    torch.testing.assert_close(output(hidden), expected[:, [5, 9]].float())
    base.config.logits_scaling, base.config.final_logit_softcapping = 4.0, None
    torch.testing.assert_close(OutputHead.of(base)(hidden), (hidden @ base.lm_head.weight.T / 4).float())
    assert OutputHead.of(base).weight.data_ptr() == base.lm_head.weight.data_ptr()


@pytest.mark.parametrize("depth", range(1, 13))
def test_three_states_of_bases_of_every_depth(depth):
    low, middle, high = default_layers(depth)
    assert 0 <= low <= middle <= high < depth
    if depth >= 7:
        assert (low, middle, high) == (2, depth // 2, depth - 3)


def test_a_head_for_another_base_is_refused_and_both_are_named():
    wide = {**LAYER, "hidden_size": 64}
    base = tiny()
    with pytest.raises(
        ValueError, match=r"a base of hidden size 64 and vocabulary 61; it cannot be used on .*hidden 32"
    ):
        compose(base, eagle(3, layer=wide, state_size=64))
    named = replace(random_head(1, vocab_size=99, draft_vocab_size=99), identity=Identity("far", 32, 99, "x"))
    with pytest.raises(ValueError, match=r"trained for far \(hidden 32, vocabulary 99\); it cannot.*vocabulary 61"):
        compose(base, EagleHead(named))
    with pytest.raises(ValueError, match=r"reads the hidden states \(1, 2, 7\), .* has 3 layers"):
        compose(base, eagle(3, layers=(1, 2, 7)))
    with pytest.raises(ValueError, match=r"of width 24 has no embedding and no output head of its own"):
        compose(base, eagle(3, layer={**LAYER, "hidden_size": 24}))
    other = replace(random_head(3), identity=replace(Identity.of(base), fingerprint="0" * 16))
    with pytest.warns(UserWarning, match="other weights"):
        compose(base, EagleHead(other))


def test_an_output_head_that_is_no_matrix_is_refused():
    base = tiny()
    base.lm_head = torch.nn.Identity()
    with pytest.raises(ValueError, match="of LlamaForCausalLM as a matrix of floats, it is Identity: load"):
        compose(base, eagle(3))


@pytest.mark.parametrize("wrong", [{"depth": -1}, {"top_k": 0}, {"grow": -1}])
def test_senseless_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="need depth, grow >= 0 and top_k >= 1"):
        EagleHead(random_head(3), **wrong)


def test_one_head_serves_sequences_and_bases_and_sampling():
    drafter = eagle(3)
    for seed in (0, 1):
        base = tiny(seed=seed)
        model = compose(base, drafter, budget=24)
        for length in (1, 20, 5):
            ids = prompt(length, seed=length)
            settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 15, "do_sample": True, "top_k": 20}
            torch.manual_seed(3)
            expected = base.generate(ids, **settings)
            torch.manual_seed(3)
            assert torch.equal(model.generate(ids, **settings), expected)


def test_a_base_that_has_lost_tokens_is_told_in_words():
    base = tiny()
    model = compose(base, eagle(), budget=8)
    base.resize_token_embeddings(VOCAB - 10)
    with pytest.raises(ValueError, match=f"knows {VOCAB} tokens, of which the base has {VOCAB - 10} by now"):
        model.generate(prompt() % 40, max_new_tokens=8, do_sample=False)


@pytest.mark.parametrize("version", [1, 3])
@pytest.mark.parametrize("levels", [0, 1, 3])
def test_a_draft_in_one_go_is_that_of_level_after_level(version, levels):
    parts = borrow(random_head(version, draft=40), tiny(dtype=torch.float32))
    apart, whole = (DraftRows(DraftCache(parts), 0) for _ in range(2))
    torch.manual_seed(0)
    ids = torch.randint(VOCAB, (30,)).tolist()
    end = 0
    with torch.no_grad():
        for count in (9, 3, 1, 4):
            states = [torch.randn(count, 32) for _ in range(parts.network.config.states)]
            end += count
            for rows in (apart, whole):
                rows.learn(states)
            root = apart.accept(ids[: end + 1])
            mine = levels_below(apart, Frontier.root(root), 4)
            again, theirs = whole.draft(ids[: end + 1], levels, 4)
            torch.testing.assert_close(again, root)
            found = list(theirs)
            assert len(found) == levels + 1
            for (claims, tokens, best), told in zip(mine, found, strict=False):
                np.testing.assert_allclose(claims, told.claims, rtol=1e-3, atol=1e-3)
                assert np.array_equal(tokens, told.tokens)
                assert np.array_equal(best, told.best)
