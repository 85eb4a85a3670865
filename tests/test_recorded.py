"""Forwards that are recorded and played again: on a CPU the operations are taped and done anew on the same tensors, as
a CUDA graph does them."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from ppd_compose.integrations.draft_model import DraftModel
from ppd_compose.integrations.eagle import draft_cache
from ppd_compose.integrations.eagle.levels import LevelPrice
from ppd_compose.integrations.medusa import MedusaHeads
from ppd_compose.integrations.recycling import TokenRecycling
from test_eagle import eagle
from test_forward import FEW_LAYERS, needs_compiler
from test_medusa import random_heads
from test_prefix import with_prefix
from tiny import VOCAB, Oracle, continuing, prompt, prompt_tokens, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, StoppingCriteria

from ppd_compose import PromptTokens, compose, fixed, forward, hookimpl, recorded, recorders
from ppd_compose import replayed as replayed_module
from ppd_compose.alternatives import AlwaysAsk
from ppd_compose.bench import Protocol, one_round
from ppd_compose.cache import GENERATE_NAME
from ppd_compose.prefix import prefix_shape
from ppd_compose.questions import Question
from ppd_compose.replayed import RecordingStore, Replayed


class Tape(TorchDispatchMode):
    """Records what is computed: whatever Python does meanwhile is done once, and a look at numbers is refused."""

    played = 0
    within = torch.inference_mode  # what was made in it can be written to in it alone

    def __init__(self, *_):
        super().__init__()

    def __call__(self, run):
        for _ in range(recorders.WARM):
            run()
        self.steps = steps = []
        with self:
            out = run()

        @self.within()
        def play():
            Tape.played += 1
            for operation, args, kwargs, before in steps:
                _write(operation(*args, **kwargs), before)
            return out

        return play

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation in WAITS or any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in _indices(operation, args)
        ):
            raise RuntimeError("the device is not to be waited for")
        out = operation(*args, **(kwargs or {}))
        self.steps.append((operation, args, kwargs or {}, out))
        return out


aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}


def _indices(operation, args):
    return args[1] if operation in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default) else ()


def _write(new, before):
    """What an operation gave stands where it stood, unless it is a view of the same or was written in place anyway."""
    for mine, theirs in zip(tree_leaves(before), tree_leaves(new), strict=True):
        if isinstance(mine, torch.Tensor) and mine.data_ptr() != theirs.data_ptr():
            mine.copy_(theirs)


def record_as_they_are(monkeypatch, kind, recorder):
    """Let compositions with `compile=True` on devices of `kind` record eager forwards."""
    monkeypatch.setitem(recorders.RECORDERS, kind, recorder)
    monkeypatch.setattr(forward, "compiled", lambda model, regions: type(model).forward.__get__(model))
    monkeypatch.setattr(forward, "can_pack", lambda model: False)
    monkeypatch.setattr(Tape, "played", 0)


@pytest.fixture
def taped(monkeypatch):
    record_as_they_are(monkeypatch, "cpu", Tape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def memories(model):
    """Those of `model` that are of no generation at the moment."""
    return [memory for _, lending in model.forwards.memories.lendings.by_model.values() for memory in lending.free]


def answer(model, ids=None, tokens=30, **more):
    ids = prompt() if ids is None else ids
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, **more)


FULL = ["llama", "qwen2", "qwen3", "phi3", "gpt_neox", "opt", "olmo2", "granite", "gpt2", "smollm3"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FULL)
def test_what_was_recorded_gives_the_tokens_of_the_base(family, attention, taped):
    base = tiny(family, attention=attention)
    want = answer(base)
    model = compose(base, Oracle(want[0].tolist()), prompt_tokens(), budget=12, compile=True)
    for seed in range(3):
        ids = prompt(seed=seed)
        assert torch.equal(answer(model, ids), answer(base, ids))
    assert Tape.played > 10


@pytest.mark.parametrize(("family", "drafter"), [("llama", with_prefix), ("gpt2", lambda base: prompt_tokens())])
def test_a_benchmark_records_nothing_while_it_times(family, drafter, taped, monkeypatch):
    base, begun = tiny(family, dtype=torch.float32), []
    ask, record = Protocol.ask, Tape.__call__

    def asked(protocol, model, number):
        with monkeypatch.context() as patch:
            patch.setattr(Tape, "__call__", lambda tape, run: begun.append(run) or record(tape, run))
            return ask(protocol, model, number)

    monkeypatch.setattr(Protocol, "ask", asked)
    protocol = Protocol([Question(prompt(12 + 8 * i, seed=i), "qa") for i in range(3)], 1, 24)
    model = compose(base, drafter(base), budget=16, compile=True)
    assert len(list(one_round({"base": base, "ppd": model}, protocol, 0))) == 3
    assert Tape.played > 10
    assert not begun


WINDOWS = [("gemma2", False), ("gemma2", True), ("gemma3", False), ("gemma3", True), ("mistral", False)]


@pytest.mark.parametrize("length", [5, 30])
@pytest.mark.parametrize(("family", "prefix"), WINDOWS)
def test_windows_are_recorded_and_given_back(family, prefix, length, taped):
    """Before they fill and after, with padding, and for another turn."""
    base, padding = tiny(family, attention="eager" if family == "gemma2" else "sdpa"), 3
    if family == "gemma2":
        padding = 0  # the base itself says NaN behind padding, in eager attention
    ids = torch.cat([torch.zeros(1, padding, dtype=torch.long), prompt(length)], dim=1)
    how = {"attention_mask": (ids != 0).long(), "do_sample": False, "return_dict_in_generate": True}
    expected = base.generate(ids, max_new_tokens=40, **how)
    oracle = Oracle(expected.sequences[0, padding:].tolist(), lie=3)
    model = compose(base, windowed(base) if prefix else prompt_tokens(), oracle, budget=20, compile=True)
    told = model.generate(ids, max_new_tokens=40, **how)
    assert torch.equal(told.sequences, expected.sequences)
    for mine, theirs in zip(told[GENERATE_NAME].layers, expected[GENERATE_NAME].layers, strict=True):
        assert type(mine) is type(theirs)
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-5, atol=1e-5)
        assert mine.get_mask_sizes(1) == theirs.get_mask_sizes(1)
    more = {"attention_mask": (expected.sequences != 0).long(), "max_new_tokens": 10, "do_sample": False}
    goes_on = [
        m.generate(expected.sequences, **continuing(turn), **more) for m, turn in ((model, told), (base, expected))
    ]
    assert torch.equal(*goes_on)
    assert Tape.played > 10


def windowed(base):
    """Prompt tokens with a prefix in those layers of `base` that keep the whole context."""
    dice = torch.Generator().manual_seed(0)
    shape = prefix_shape(base, 2)
    return PromptTokens(torch.randn(2, 2, 32, generator=dice), prefix=torch.randn(shape, generator=dice))


def test_all_drafters_with_prefix_padding_and_chunks(taped):
    """Hidden states, prefixes and rows in front are as of forwards that are launched."""
    base = tiny()
    ids = torch.cat([torch.zeros(1, 5, dtype=torch.long), prompt()], dim=1)
    how = {"attention_mask": (ids != 0).long(), "max_new_tokens": 40, "do_sample": False, "prefill_chunk_size": 4}
    want = base.generate(ids, **how)
    told = []
    for compile in (False, True):
        drafters = [with_prefix(base, 3, 2, 2), MedusaHeads(random_heads()), eagle(grow=4), TokenRecycling()]
        model = compose(base, *drafters, Oracle(want[0].tolist(), lie=3), budget=20, compile=compile)
        assert torch.equal(model.generate(ids, **how), want)
        told.append((model.stats.forwards, dict(model.stats.candidates), dict(model.stats.accepted)))
    assert told[0] == told[1]


def beside(base):
    """Drafters that have forwards of their own."""
    draft = tiny(seed=3)
    return {
        "medusa": MedusaHeads(random_heads()),
        "eagle-1": eagle(1, grow=2),
        "eagle-3": eagle(3, grow=2),
        "draft-model": DraftModel(draft, 4, 2),
        "draft-model of a chain": DraftModel(draft),
        "draft-model with prompt tokens": DraftModel(draft, 4, 2, with_prefix(draft, 2, 2, 3), forwards=3),
        "prompt tokens": with_prefix(base, 2, 3, 2),
    }


@pytest.mark.parametrize("name", beside(tiny()))
def test_what_drafters_compute_is_recorded_too_and_is_the_same(name, taped):
    """With and without an oracle, whose paths EAGLE grows and by which several tokens are taken up at a time."""
    base = tiny()
    how = {"max_new_tokens": 45, "do_sample": False}
    told = {}
    for compile in (False, True):
        drafter, trees = beside(base)[name], []
        watch = Proposed(trees)
        for others in ([], [Oracle(answer(base, tokens=45)[0].tolist(), lie=4)]):
            model = compose(base, drafter, *others, budget=16, compile=compile, plugins=[watch, AlwaysAsk()])
            for seed in (0, 1):
                ids = prompt(seed=seed)
                assert torch.equal(model.generate(ids, **how), base.generate(ids, **how))
        told[compile] = trees
    assert len(told[True]) == len(told[False]) > 60
    for mine, theirs in zip(told[True], told[False], strict=True):
        assert mine.tokens.tolist() == theirs.tokens.tolist()
        assert mine.parents.tolist() == theirs.parents.tolist()
        np.testing.assert_allclose(mine.log_probs, theirs.log_probs, atol=1e-5)
    assert drafted(drafter)


def lendings(drafter):
    """By model what `drafter` computes with."""
    mine = drafter._ready if isinstance(drafter, MedusaHeads) else drafter
    return [lending for _, lending in mine._lendings.by_model.values()]


def drafted(drafter):
    """Recordings of what `drafter` computes by itself."""
    things = [thing for lending in lendings(drafter) for thing in lending.free]
    runs = [run for thing in things for run in (thing, *vars(thing).values()) if isinstance(run, Replayed)]
    return [key for run in runs if run.store for key in run.store.recordings]


class Proposed:
    """Keeps the trees that drafters propose and extend."""

    name = "proposed"

    def __init__(self, kept):
        self.kept = kept

    @hookimpl(wrapper=True)
    def propose(self, step):
        made = yield
        self.kept += made
        return made

    @hookimpl(wrapper=True)
    def extend(self, step, tree):
        made = yield
        self.kept += made
        return made


@pytest.mark.parametrize("name", ["eagle-3", "draft-model", "draft-model of a chain"])
def test_a_drafter_s_memory_that_grows_is_recorded_anew(name, taped, monkeypatch):
    monkeypatch.setattr(fixed, "FEWEST", 16)
    monkeypatch.setattr(draft_cache, "SPARE", 4)
    monkeypatch.setattr(recorded, "BLOCK", 8)
    base = tiny()
    drafter = beside(base)[name]
    model = compose(base, drafter, budget=16, compile=True, plugins=[AlwaysAsk()])
    for _ in range(2):
        assert torch.equal(answer(model, tokens=100), answer(base, tokens=100))
    assert drafted(drafter)


@pytest.mark.parametrize("name", ["medusa", "eagle-3", "draft-model"])
def test_each_answer_has_a_drafter_s_recordings_to_itself(name, taped):
    """The second begins and ends in the midst of the first, another breaks off."""
    base = tiny()
    drafter = beside(base)[name]
    model = compose(base, drafter, budget=16, compile=True)

    class Asks(StoppingCriteria):
        breaks = False

        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] == 20:
                if self.breaks:
                    raise KeyboardInterrupt
                self.asked = answer(model, prompt(seed=5))
            return torch.zeros(1, dtype=torch.bool)

    asks = Asks()
    assert torch.equal(answer(model, stopping_criteria=[asks]), answer(base))
    assert torch.equal(asks.asked, answer(base, prompt(seed=5)))
    asks.breaks = True
    with pytest.raises(KeyboardInterrupt):
        answer(model, stopping_criteria=[asks])
    assert torch.equal(answer(model), answer(base))
    (lending,) = lendings(drafter)
    assert len(lending.free) == 2


@pytest.mark.parametrize("compile", [False, True])
def test_a_drafter_that_was_made_ready_in_inference_mode_and_not_asked_serves_without_it(compile, taped):
    base = tiny()
    model = compose(base, eagle(), budget=16, compile=compile)
    with torch.inference_mode():
        answer(model, tokens=1)
    assert torch.equal(answer(model), answer(base))


def test_a_draft_head_keeps_no_keys_of_an_answer_that_has_ended_where_nothing_is_recorded():
    base, drafter = tiny(), eagle()
    assert torch.equal(answer(compose(base, drafter, budget=16)), answer(base))
    ((_, lending),) = drafter._lendings.by_model.values()
    assert [held.keys for held in lending.free] == [None]


def test_a_draft_during_which_something_was_recorded_is_not_timed(taped, monkeypatch):
    told, book = [], LevelPrice.book
    monkeypatch.setattr(LevelPrice, "book", lambda price, levels: (told.append(levels), book(price, levels)))
    base = tiny()
    model = compose(base, eagle(3), budget=16, compile=True, plugins=[AlwaysAsk()])
    counts = []
    for _ in range(3):
        assert torch.equal(answer(model), answer(base))
        counts.append(len(told))
        told.clear()
    assert counts[0] < counts[1] == counts[2]


def test_a_function_is_recorded_for_each_shape_and_its_answers_are_the_caller_s(monkeypatch):
    monkeypatch.setattr(replayed_module, "MOST", 3)
    ran = []

    def run(a, b, *, factor):
        ran.append(1)
        return (a * factor + b,)

    store = RecordingStore(lambda: Tape("cpu"), "sums")
    double = Replayed(run, torch.device("cpu"), store)
    kept = []
    for size in (1, 2, 3, 1, 2, 3):
        for factor in (2, 3):
            a, b = torch.randn(2, size)
            (told,) = double(a, b, factor=factor)
            kept.append((told, a * factor + b))
    assert all(torch.equal(told, expected) for told, expected in kept)
    assert len(store.recordings) <= 3
    before = len(ran)
    double(a, b, factor=3)
    assert len(ran) == before


def test_memory_that_grows_is_recorded_anew(taped, monkeypatch):
    monkeypatch.setattr(fixed, "FEWEST", 16)
    monkeypatch.setattr(recorded, "BLOCK", 8)
    base = tiny()
    want = answer(base, tokens=100)
    model = compose(base, Oracle(want[0].tolist()), with_prefix(base), budget=12, compile=True)
    for _ in range(2):
        assert torch.equal(answer(model, tokens=100), want)
    (memory,) = memories(model)
    assert memory.room == 128
    assert {columns for _, _, _, columns, *_ in memory.store.recordings} > {112}


def test_a_chat_goes_on_from_a_cache_that_later_answers_leave_alone(taped):
    base = tiny()
    told = []
    for model in (base, compose(base, prompt_tokens(), budget=12, compile=True)):
        first = answer(model, tokens=12, return_dict_in_generate=True)
        answer(model, prompt(50, seed=3))  # writes where the first one was
        ids = torch.cat([first.sequences, prompt(seed=1)], dim=1)
        second = answer(model, ids, return_dict_in_generate=True, output_logits=True, **continuing(first))
        told.append((second.sequences, second[GENERATE_NAME].layers[1].keys, torch.stack(second.logits)))
    for ours, theirs in zip(*told, strict=True):
        assert torch.equal(ours, theirs) or torch.allclose(ours, theirs)


def test_sampling_gives_the_same_draws_and_scores(taped):
    base = tiny()
    told = []
    for model in (base, compose(base, prompt_tokens(), budget=12, compile=True)):
        torch.manual_seed(3)
        how = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2}
        out = model.generate(prompt(), max_new_tokens=30, **how, return_dict_in_generate=True, output_scores=True)
        told.append((out.sequences, torch.stack(out.scores)))
    assert torch.equal(told[0][0], told[1][0])
    assert torch.allclose(told[0][1], told[1][1])


def test_two_answers_at_once_do_not_share_memory(taped):
    """The second begins and ends in the midst of the first."""
    base = tiny()
    model = compose(base, prompt_tokens(), budget=12, compile=True)

    class Asks(StoppingCriteria):
        asked = None

        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] == 20:
                self.asked = answer(model, prompt(seed=5))
            return torch.zeros(1, dtype=torch.bool)

    asks = Asks()
    assert torch.equal(answer(model, stopping_criteria=[asks]), answer(base))
    assert torch.equal(asks.asked, answer(base, prompt(seed=5)))
    assert len(memories(model)) == 2


def test_weights_that_lie_elsewhere_are_recorded_anew_and_those_written_over_are_read(taped):
    base = tiny()
    model = compose(base, prompt_tokens(), budget=12, compile=True)
    assert torch.equal(answer(model), before := answer(base))
    with torch.no_grad():
        base.model.layers[1].mlp.down_proj.weight.mul_(-1.5)
    assert not torch.equal(answer(base), before)
    assert torch.equal(answer(model), answer(base))
    model.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.flip(0))
    assert torch.equal(answer(model)[0, 12], (VOCAB - 1 - answer(base))[0, 12])
    assert len(memories(model)) == 1


def test_numbers_of_an_answer_that_are_none_spoil_no_later_one(taped):
    base = tiny()
    model = compose(base, Oracle(answer(base)[0].tolist()), budget=12, compile=True)
    weight = base.model.embed_tokens.weight
    with torch.no_grad():
        held, weight[5] = weight[5].clone(), torch.nan
        answer(model, torch.full((1, 9), 5))
        weight[5] = held
    assert torch.equal(answer(model), answer(base))


def test_what_cannot_be_recorded_is_computed_anew_with_a_word(monkeypatch, taped):
    """A router that asks the device how many tokens an expert gets, say."""
    base = tiny("mixtral")
    model = compose(base, prompt_tokens(), budget=12, compile=True)
    with pytest.warns(UserWarning, match="forwards of MixtralForCausalLM cannot be recorded, so each is launched"):
        assert torch.equal(answer(model), answer(base))
    (memory,) = memories(model)
    assert not memory.store.works
    assert torch.equal(answer(model, tokens=60), answer(base, tokens=60))  # without another word


def test_what_was_recorded_in_inference_mode_serves_without_it_too(taped):
    base = tiny()
    model = compose(base, prompt_tokens(), budget=12, compile=True)
    with torch.inference_mode():
        assert torch.equal(answer(model), answer(base))
    played = Tape.played
    assert torch.equal(answer(model), answer(base))
    assert Tape.played > played


def test_hooks_of_the_user_are_run_at_every_forward(taped):
    base, ran = tiny(), []
    base.model.layers[1].mlp.register_forward_hook(lambda *_: ran.append(1))
    model = compose(base, prompt_tokens(), budget=12, compile=True)
    assert torch.equal(answer(model), answer(base))
    assert not Tape.played
    assert len(ran) >= model.stats.forwards


def test_recordings_are_few(taped, monkeypatch):
    monkeypatch.setattr(replayed_module, "MOST", 2)
    base = tiny()
    model = compose(base, with_prefix(base), MedusaHeads(random_heads()), budget=12, compile=True)
    assert torch.equal(answer(model), answer(base))
    (memory,) = memories(model)
    assert 1 <= len(memory.store.recordings) <= 2


@pytest.mark.parametrize("after", [1, 2, 7])
def test_an_answer_that_breaks_off_leaves_the_cache_that_it_was_given(after, taped):
    base, told = tiny(), []
    for compile in (False, True):
        model = compose(base, prompt_tokens(), budget=12, compile=compile)
        cache = DynamicCache(config=base.config)

        class Breaks(StoppingCriteria):
            left = after

            def __call__(self, input_ids, scores, **kwargs):
                self.left -= 1
                if not self.left:
                    raise KeyboardInterrupt
                return torch.zeros(1, dtype=torch.bool)

        with pytest.raises(KeyboardInterrupt):
            answer(model, stopping_criteria=[Breaks()], **{GENERATE_NAME: cache})
        told.append([(type(layer), layer.keys) for layer in cache.layers])
        assert torch.equal(answer(model), answer(base))
    for (kind, keys), (other, theirs) in zip(*told, strict=True):
        assert (kind, keys.shape) == (other, theirs.shape)
        assert torch.allclose(keys, theirs)


def test_a_budget_knows_the_sizes(taped):
    model = compose(tiny(), prompt_tokens(), compile=True)
    model.warmup()
    assert model.budget.rows == (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64)
    assert [recorded.recorded_rows(rows) for rows in model.budget.rows] == [2, 2, 4, 4, 8, 8, 16, 16, 32, 32, 64, 64]
    assert recorded.recorded_rows(65) == 128


def test_a_forward_sees_few_numbers_of_columns_and_never_many_too_many():
    sizes = [recorded.shown_columns(n) for n in range(1, 9000)]
    assert all(n <= size < max(1.25 * n, n + 256) for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 20


class Keeps:
    """Observer that keeps what it was shown."""

    name = "keeps"

    def __init__(self):
        self.kept = []

    @hookimpl
    def observe(self, step, logits):
        self.kept.append((logits, logits.clone()))


def test_what_a_plugin_keeps_of_a_forward_is_not_written_over(taped):
    keeps = Keeps()
    answer(compose(tiny(), prompt_tokens(), budget=12, plugins=[keeps], compile=True))
    assert Tape.played > 10
    assert all(torch.equal(kept, then) for kept, then in keeps.kept)


def test_one_graph_of_fixed_sizes_serves_windows(traced, monkeypatch):
    monkeypatch.setitem(recorders.RECORDERS, "cpu", lambda *_: lambda run: run)
    base = tiny("gemma3", **FEW_LAYERS["gemma3"])
    model = compose(base, prompt_tokens(), budget=12, compile=True)
    assert torch.equal(answer(model), answer(base))
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (5, 50):
            assert torch.equal(answer(model, prompt(length)), answer(base, prompt(length)))


@needs_compiler
def test_a_compiled_forward_of_fixed_sizes_gives_the_tokens_of_the_base(monkeypatch):
    """As it is where it cannot be recorded."""
    monkeypatch.setitem(recorders.RECORDERS, "cpu", lambda *_: lambda run: run)
    base = tiny()
    model = compose(base, with_prefix(base), budget=12, compile=True)
    assert torch.equal(answer(model), answer(base))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(answer(model, tokens=100), answer(base, tokens=100))
        assert torch.equal(answer(model, prompt(50, seed=3)), answer(base, prompt(50, seed=3)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", beside(tiny()))
def test_cuda_graphs_draft_what_launched_forwards_do(name):
    base = tiny().to("cuda")
    trees = {}
    for compile in (False, True):
        drafter, proposed = beside(base)[name], []
        if name.startswith("draft-model"):
            drafter.model.to("cuda")
        model = compose(base, drafter, budget=16, compile=compile, plugins=[Proposed(proposed), AlwaysAsk()])
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".* cannot be recorded")
            for seed in range(3):
                ids = prompt(seed=seed).cuda()
                assert torch.equal(answer(model, ids, 60), answer(base, ids, 60))
        trees[compile] = [tree.tokens.tolist() for tree in proposed]
    assert trees[True] == trees[False]
    assert drafted(drafter)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", [*FULL, "gemma3", "mistral"])
def test_cuda_graphs_give_the_tokens_of_the_base(family):
    base = tiny(family).to("cuda")
    drafter = with_prefix(base) if family in FULL else prompt_tokens()
    model = compose(base, drafter, Oracle(answer(base, prompt().cuda())[0].tolist()), budget=12, compile=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "forwards of .* cannot be recorded")
        for tokens in (30, 100):
            for seed in range(3):
                ids = prompt(seed=seed).cuda()
                assert torch.equal(answer(model, ids, tokens), answer(base, ids, tokens))
    (memory,) = memories(model)
    assert len(memory.store.recordings) > 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graphs_say_in_half_precision_what_launched_forwards_do():
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.1}
    base = tiny(dtype=torch.bfloat16, **sizes).to("cuda")  # heads of 64, which the fast kernels take
    ids, told = prompt().cuda(), {}
    for compile in (False, True):
        model = compose(base, prompt_tokens(hidden=128), budget=12, compile=compile)
        told[compile] = answer(model, ids, 2, output_logits=True, return_dict_in_generate=True).logits[1]
    torch.testing.assert_close(told[True], told[False], atol=0.05, rtol=0.05)


def test_a_device_that_must_not_be_waited_for_may_be_again_where_warnings_are_errors(monkeypatch):
    """As torch warns when it is told so the first time."""
    mode = []

    def told(now):
        mode.append(now)
        warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=2)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda now: mode.append(now) if mode else told(now))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with recorders._refusing_to_wait():
            assert mode == ["error"]
    assert mode == ["error", 0]


def test_other_threads_are_not_to_wait_once_for_each_model_and_no_more(monkeypatch):
    """Whoever waits meanwhile, in any thread, gets an error."""
    made = []

    class Noted(Tape):
        def __init__(self, device, never_wait):
            super().__init__()
            made.append(never_wait)

    record_as_they_are(monkeypatch, "cpu", Noted)
    base = tiny()
    model, another = (compose(base, prompt_tokens(), budget=12, compile=True) for _ in range(2))
    answer(model, tokens=600)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda seed: answer(model, prompt(seed=seed), tokens=60), range(6)))
    mine = len({id(seen) for seen in made})
    assert len(made) > mine
    assert mine == 2  # of its forwards, and of what its prompt tokens guess
    answer(another)
    assert len({id(seen) for seen in made}) == 2 * mine
