"""generate() as transformers means it: lengths, stops, processors, sampling, streams, dictionaries, chats, chunks."""

import math
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
from ppd_compose.integrations.recycling import TokenRecycling
from tiny import GROUPED, VOCAB, Oracle, continuing, prompt, prompt_tokens, tiny
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MllamaForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.models.mllama import MllamaTextConfig

from ppd_compose import PromptTokens, compose, hookimpl, inplace, verify, written
from ppd_compose.cache import GENERATE_NAME, with_cache
from ppd_compose.decode import Decoding
from ppd_compose.stopping import Stops

PREFIX = torch.ones(3, 2, 2, 1, 8)  # of prompt tokens for `tiny`


def pair(family="llama", tokens=40, **kwargs):
    """A base, a composition that guesses its greedy answer, and the prompt."""
    base = tiny(family, **kwargs)
    ids = prompt()
    answer = base.generate(ids, max_new_tokens=tokens + 10, do_sample=False, eos_token_id=None)[0].tolist()
    return base, compose(base, prompt_tokens(3, 2), Oracle(answer), budget=32), ids


def same(base, model, ids, **kwargs):
    expected = base.generate(ids, **kwargs)
    assert torch.equal(model.generate(ids, **kwargs), expected)
    return expected


def known_in_part(base, processors=None, **kwargs):
    """The answer of `base`, by a composition that guesses two thirds of it, in fewer forwards than it has tokens."""

    def answer(model):
        torch.manual_seed(0)
        mine = [] if processors is None else [processors()]
        return model.generate(prompt(), logits_processor=LogitsProcessorList(mine), **kwargs)

    expected = answer(base)
    model = compose(base, prompt_tokens(3, 2), Oracle(expected[0].tolist()), budget=32)
    assert torch.equal(answer(model), expected)
    assert model.stats.forwards < 0.75 * model.stats.tokens


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 20])
def test_max_new_tokens_and_max_length_never_overshoot(tokens):
    base, model, ids = pair()
    assert same(base, model, ids, max_new_tokens=tokens, do_sample=False).shape[1] == 12 + tokens
    assert same(base, model, ids, max_length=12 + tokens, do_sample=False).shape[1] == 12 + tokens


def test_a_prompt_of_short_integers_comes_back_as_from_generate():
    base, model, ids = pair()
    expected = same(base, model, ids.int(), max_new_tokens=5, do_sample=False)
    assert model.generate(ids.int(), max_new_tokens=5, do_sample=False).dtype == expected.dtype


def test_several_eos_ids_and_min_new_tokens():
    base, model, ids = pair()
    answer = base.generate(ids, max_new_tokens=40, do_sample=False)[0, 12:].tolist()
    eos = [answer[9], answer[20]]
    stopped = same(base, model, ids, max_new_tokens=40, do_sample=False, eos_token_id=eos)
    assert stopped.shape[1] <= 12 + 10
    same(base, model, ids, max_new_tokens=40, min_new_tokens=15, do_sample=False, eos_token_id=eos)


def test_custom_stopping_criterion_is_asked_once_a_token():
    class AtLength(StoppingCriteria):
        def __init__(self):
            self.asked = []

        def __call__(self, input_ids, scores, **kwargs):
            self.asked.append(input_ids.shape[1])
            return torch.full((len(input_ids),), input_ids.shape[1] >= 29)

    base, model, ids = pair()
    criterion = AtLength()
    same(base, model, ids, max_new_tokens=40, do_sample=False, stopping_criteria=StoppingCriteriaList([AtLength()]))
    model.generate(ids, max_new_tokens=40, do_sample=False, stopping_criteria=StoppingCriteriaList([criterion]))
    assert criterion.asked == list(range(13, 30))


class Favours(LogitsProcessor):
    """Depends on the whole prefix, and writes in place."""

    def __call__(self, input_ids, scores):
        assert len(input_ids) == len(scores) == 1
        scores[:, (int(input_ids.sum()) * 31) % VOCAB] += 3.0
        return scores


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [7, 9]]},
        {"suppress_tokens": [3, 4]},
        {"forced_eos_token_id": 9},
        {"exponential_decay_length_penalty": (15, 1.5), "eos_token_id": 9},
        {"sequence_bias": [[[11], 2.0]]},
        {"watermarking_config": WatermarkingConfig(bias=2.5, seeding_scheme="selfhash")},
        # These keep state from one token to the next.
        {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[654, 400, 836, 123], ngram_len=3)},
        {"guidance_scale": 1.7},
        {"guidance_scale": 1.7, "negative_prompt_ids": torch.tensor([[5, 9, 3]])},
    ],
    ids=lambda s: "+".join(s),
)
@pytest.mark.parametrize("do_sample", [False, True])
def test_every_processor_sees_the_prefix_of_its_node(settings, do_sample):
    known_in_part(tiny(), max_new_tokens=40, do_sample=do_sample, **settings)


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_processor_is_asked_once_a_token_in_order(do_sample):
    """So that those which keep state, as those of grammars do, serve a composition too."""

    class Follows(LogitsProcessor):
        def __init__(self):
            self.seen = None

        def __call__(self, input_ids, scores):
            assert self.seen is None or self.seen == input_ids[0, :-1].tolist()
            self.seen = input_ids[0].tolist()
            scores[:, sum(self.seen) % VOCAB] += 3.0
            return scores

    known_in_part(tiny(), max_new_tokens=40, do_sample=do_sample, processors=Follows)


def test_users_processor_and_prefix_function():
    base, model, ids = pair()
    same(base, model, ids, max_new_tokens=40, do_sample=False, logits_processor=LogitsProcessorList([Favours()]))

    def allowed(batch, prefix):
        assert batch == 0
        return [(int(prefix[-1]) * k + 1) % VOCAB for k in (1, 2, 3)]

    same(base, model, ids, max_new_tokens=40, do_sample=False, prefix_allowed_tokens_fn=allowed)


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.3}, {"top_k": 5}, {"top_p": 0.7, "repetition_penalty": 1.2}]
)
def test_same_seed_same_tokens_as_sampling_with_generate(settings):
    base, model, ids = pair()
    for seed in range(5):
        torch.manual_seed(seed)
        expected = base.generate(ids, max_new_tokens=30, do_sample=True, **settings)
        torch.manual_seed(seed)
        assert torch.equal(model.generate(ids, max_new_tokens=30, do_sample=True, **settings), expected)


def test_a_generator_gives_the_draws():
    _, model, ids = pair()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(drawn))
        dice = torch.Generator().manual_seed(seed)
        drawn.append(model.generate(ids, max_new_tokens=30, do_sample=True, generator=dice))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


class Recorder(BaseStreamer):
    def __init__(self, fail_at=None):
        self.events, self.fail_at = [], fail_at

    def put(self, value):
        self.events.append(value.tolist())
        if len(self.events) == self.fail_at:
            raise RuntimeError("cancelled")

    def end(self):
        self.events.append("end")


def test_streamer_gets_prompt_then_tokens_then_end():
    base, model, ids = pair()
    mine, theirs = Recorder(), Recorder()
    model.generate(ids, max_new_tokens=20, do_sample=False, streamer=mine)
    base.generate(ids, max_new_tokens=20, do_sample=False, streamer=theirs)
    assert mine.events == theirs.events
    assert mine.events[-1] == "end"


def test_streamer_that_raises_cancels_and_still_gets_its_end():
    base, model, ids = pair()
    recorder = Recorder(fail_at=6)
    before = base(ids).logits
    with pytest.raises(RuntimeError, match="cancelled"):
        model.generate(ids, max_new_tokens=20, do_sample=False, streamer=recorder)
    assert recorder.events[-1] == "end"
    assert torch.equal(base(ids).logits, before)
    same(base, model, ids, max_new_tokens=20, do_sample=False)
    refused = Recorder()
    with pytest.raises(ValueError, match="beam"):
        model.generate(ids, num_beams=2, max_new_tokens=4, streamer=refused)
    assert refused.events == ["end"]


def test_dictionary_with_scores_logits_and_cache():
    base, model, ids = pair()
    wanted = {
        "max_new_tokens": 25, "do_sample": False, "repetition_penalty": 1.2,
        "return_dict_in_generate": True, "output_scores": True, "output_logits": True,
    }  # fmt: skip
    mine, theirs = model.generate(ids, **wanted), base.generate(ids, **wanted)
    assert torch.equal(mine.sequences, theirs.sequences)
    assert len(mine.scores) == len(theirs.scores) == len(mine.logits) == 25
    torch.testing.assert_close(torch.cat(mine.scores), torch.cat(theirs.scores))
    torch.testing.assert_close(torch.cat(mine.logits), torch.cat(theirs.logits))
    assert mine[GENERATE_NAME].get_seq_length() == theirs[GENERATE_NAME].get_seq_length()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_a_chat_goes_on_from_the_returned_cache(family):
    base, model, ids = pair(family)
    for first, second in ((model, model), (model, base), (base, model)):
        turn = first.generate(ids, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
        longer = torch.cat([turn.sequences, prompt(6, seed=3)], dim=1)
        settings = {"attention_mask": torch.ones_like(longer), "max_new_tokens": 20, "do_sample": False}
        expected = base.generate(longer, **settings)
        told = second.generate(longer, **continuing(turn), **settings)
        assert torch.equal(told, expected)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_a_cache_may_be_given_by_its_old_name():
    base, model, ids = pair()
    turn = model.generate(ids, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([turn.sequences, prompt(6, seed=3)], dim=1)
    settings = {"attention_mask": torch.ones_like(longer), "max_new_tokens": 20, "do_sample": False}
    expected = base.generate(longer, **settings)
    assert torch.equal(model.generate(longer, past_key_values=turn[GENERATE_NAME], **settings), expected)


def test_a_forward_of_old_code_is_given_its_cache_by_the_old_name():
    class Older(LlamaForCausalLM):
        def forward(
            self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
            use_cache=None, logits_to_keep=0, **kwargs,
        ):  # fmt: skip
            return super().forward(
                input_ids, attention_mask, position_ids, past_key_values, inputs_embeds,
                use_cache=use_cache, logits_to_keep=logits_to_keep, **kwargs,
            )  # fmt: skip

    base, _, ids = pair()
    older = Older(base.config).to(base.dtype).eval()
    older.load_state_dict(base.state_dict())
    settings = {"max_new_tokens": 20, "do_sample": False}
    model = compose(older, prompt_tokens(), budget=12)
    assert torch.equal(model.generate(ids, **settings), base.generate(ids, **settings))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("cut_off", [None, 2, 6])
def test_a_cache_comes_back_as_transformers_made_it(family, cut_off):
    base, model, ids = pair(family)
    cache = DynamicCache(config=base.config)
    with torch.no_grad():
        base(ids[:, :-1], **with_cache(base, cache))
    layers, held = list(cache.layers), [layer.keys for layer in cache.layers]
    before = [keys.clone() for keys in held]
    streamer = Recorder(fail_at=cut_off)
    with nullcontext() if cut_off is None else pytest.raises(RuntimeError, match="cancelled"):
        model.generate(ids, **{GENERATE_NAME: cache}, max_new_tokens=20, do_sample=False, streamer=streamer)
    assert all(mine is layer for mine, layer in zip(cache.layers, layers, strict=True))
    assert all(torch.equal(keys, same) for keys, same in zip(held, before, strict=True))
    tokens = torch.cat([torch.tensor(event).flatten() for event in streamer.events[:-1]])
    fresh = DynamicCache(config=base.config)
    with torch.no_grad():
        base(tokens[None, : cache.get_seq_length()], **with_cache(base, fresh))
    for mine, theirs in zip(cache.layers, fresh.layers, strict=True):
        assert type(mine) is type(theirs)
        torch.testing.assert_close(mine.keys, theirs.keys)
        torch.testing.assert_close(mine.values, theirs.values)


def said(streamer):
    """The tokens `[1, length]` that a streamer was given."""
    return torch.cat([torch.tensor(event).flatten() for event in streamer.events if event != "end"])[None]


def goes_on(base, model, cache, streamer):
    """`model` goes on with `cache` from what `streamer` was given, as `base` does without."""
    settings = {"attention_mask": torch.ones_like(said(streamer)), "max_new_tokens": 20, "do_sample": False}
    expected = base.generate(said(streamer), **settings)
    assert torch.equal(model.generate(said(streamer), **{GENERATE_NAME: cache}, **settings), expected)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("length", [12, 16, 17, 30])
def test_a_call_cut_off_at_its_first_token_leaves_a_cache_to_go_on_from(family, length):
    base, model, _ = pair(family)
    cache, streamer = DynamicCache(config=base.config), Recorder(fail_at=2)
    with pytest.raises(RuntimeError, match="cancelled"):
        model.generate(prompt(length), **{GENERATE_NAME: cache}, max_new_tokens=20, do_sample=False, streamer=streamer)
    goes_on(base, model, cache, streamer)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("length", [12, 30])
def test_a_forward_that_breaks_off_leaves_a_cache_to_go_on_from(family, length):
    base, model, _ = pair(family)
    cache, streamer, forwards = DynamicCache(config=base.config), Recorder(), []

    def breaks(*_):
        forwards.append(1)
        if len(forwards) == 4:
            raise MemoryError("full")

    inner = getattr(base.model, "language_model", base.model)
    handle = inner.layers[1].register_forward_pre_hook(breaks)
    with pytest.raises(MemoryError):
        model.generate(prompt(length), **{GENERATE_NAME: cache}, max_new_tokens=20, do_sample=False, streamer=streamer)
    handle.remove()
    goes_on(base, model, cache, streamer)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_an_interrupt_while_the_device_works_leaves_a_cache_to_go_on_from(family, monkeypatch):
    base, model, _ = pair(family)
    cache, streamer, waits = DynamicCache(config=base.config), Recorder(), []

    def interrupted(*_):
        waits.append(1)
        if len(waits) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(verify, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.generate(prompt(30), **{GENERATE_NAME: cache}, max_new_tokens=20, do_sample=False, streamer=streamer)
    assert cache.get_seq_length() == said(streamer).shape[1] - 1
    goes_on(base, model, cache, streamer)


class Interruption:
    """The user's, at the `line`-th line of the project's that runs between the third forward and the end of its step;
    `happened` tells whether there was such a line."""

    def __init__(self, line):
        self.left, self.takes, self.happened = line, 0, False

    def __enter__(self):
        self.tracer = sys.gettrace()
        sys.settrace(self.called)

    def __exit__(self, *_):
        sys.settrace(self.tracer)

    def called(self, frame, event, _):
        self.takes += frame.f_code is Decoding.take.__code__
        if self.takes == 3 and frame.f_code is Decoding.observe.__code__:
            self.takes += 1
        ours = Path(frame.f_code.co_filename).parent.name == "ppd_compose"
        return self.ran if ours and self.takes == 3 else None

    def ran(self, frame, event, _):
        self.left -= event == "line" and self.takes == 3
        if self.left == 0 and not self.happened:
            self.happened = True
            raise KeyboardInterrupt
        return self.ran


@pytest.mark.parametrize(
    ("family", "prefix"), [("llama", None), ("llama", PREFIX), ("mistral", None), ("gemma3", None)]
)
def test_an_interrupt_anywhere_behind_a_forward_leaves_a_cache_to_go_on_from(family, prefix):
    base, ids = tiny(family), prompt(30)
    answer = base.generate(ids, max_new_tokens=40, do_sample=False)[0].tolist()
    model = compose(base, PromptTokens(torch.ones(3, 1, 32), prefix=prefix), Oracle(answer), budget=32)
    assert lines_interrupted(Interruption, base, model, ids, every=7) > 50


def lines_interrupted(kind, base, model, ids, every):
    """How many lines there were, after an interruption of that `kind` at each of every few of them."""
    for line in range(1, 1000, every):
        cache, streamer, interruption = DynamicCache(config=base.config), Recorder(), kind(line)
        with suppress(KeyboardInterrupt), interruption:
            model.generate(ids, **{GENERATE_NAME: cache}, max_new_tokens=20, do_sample=False, streamer=streamer)
        if not interruption.happened:
            break
        assert cache.get_seq_length() < said(streamer).shape[1]
        goes_on(base, model, cache, streamer)
    return line


class WhileRoomIsMade(Interruption):
    """The same in what makes room for keys and values, from the third forward on."""

    parts = (inplace.make_room, written.WindowLayer.slide, written.InPlaceLayer.grow, written.InPlaceLayer._take)

    def called(self, frame, event, _):
        self.takes += self.takes < 3 and frame.f_code is inplace.make_room.__code__
        return self.ran if self.takes == 3 and frame.f_code in [part.__code__ for part in self.parts] else None


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_an_interrupt_while_room_is_made_leaves_a_cache_to_go_on_from(family, monkeypatch):
    monkeypatch.setattr(written, "ROOM", 8)  # so that windows slide
    base, ids = tiny(family), prompt(30)
    model = compose(base, prompt_tokens(), Oracle(base.generate(ids, max_new_tokens=40)[0].tolist(), lie=3), budget=32)
    assert 50 < lines_interrupted(WhileRoomIsMade, base, model, ids, every=11) < 500


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_a_cache_that_knows_no_windows_is_refused_where_the_base_has_some(family):
    base, model, ids = pair(family)
    cache = DynamicCache()
    with torch.no_grad():
        base(ids[:, :-1], **with_cache(base, cache))
    with pytest.raises(ValueError, match=r"other windows than .*DynamicCache\(config=model.config\)"):
        model.generate(ids, **{GENERATE_NAME: cache}, max_new_tokens=5, do_sample=False)


def test_a_cache_without_a_config_serves_a_base_without_windows():
    base, model, ids = pair()
    cache = DynamicCache()
    with torch.no_grad():
        base(ids[:, :-1], **with_cache(base, cache))
    expected = base.generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(model.generate(ids, **{GENERATE_NAME: cache}, max_new_tokens=20, do_sample=False), expected)


def test_an_empty_cache_serves_a_base_without_windows_and_is_filled():
    base, model, ids = pair()
    cache, expected = DynamicCache(), base.generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(model.generate(ids, **{GENERATE_NAME: cache}, max_new_tokens=20, do_sample=False), expected)
    assert cache.get_seq_length() == expected.shape[1] - 1


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_windows_count_hidden_tokens_as_generate_does(family):
    base, ids = tiny(family), prompt(30)
    for hole in (slice(12, 15), slice(20, 26), slice(3, 5)):
        mask = torch.ones_like(ids)
        mask[:, hole] = 0
        settings = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False}
        expected = base.generate(ids, **settings)
        shown = [token for at, token in enumerate(expected[0].tolist()) if not hole.start <= at < hole.stop]
        model = compose(base, prompt_tokens(3, 2), Oracle(shown), budget=32)  # drafters see no padding
        assert torch.equal(model.generate(ids, **settings), expected)


def test_layers_that_look_at_images_and_have_none():
    """Text alone passes their layers by, which leaves those of the cache without keys."""
    text = {**GROUPED, "cross_attention_layers": [1], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    torch.manual_seed(0)
    base = MllamaForCausalLM(MllamaTextConfig(**text)).eval().double()
    base.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1)
    expected = base.generate(prompt(), max_new_tokens=20, do_sample=False)
    for settings in ({"budget": 12}, {}):
        model = compose(base, prompt_tokens(), Oracle(expected[0].tolist()), **settings)
        assert torch.equal(model.generate(prompt(), max_new_tokens=20, do_sample=False), expected)
        assert model.stats.tokens_per_forward > 2


def test_a_cache_that_holds_an_image_is_refused():
    base, model, ids = pair()
    cache = DynamicCache()
    with torch.no_grad():
        base(ids[:, :-1], **with_cache(base, cache))
    cache.layers[1].keys, cache.layers[1].values = (torch.zeros(1, 2, 5, 8, dtype=torch.float64) for _ in range(2))
    with pytest.raises(ValueError, match=r"different numbers of tokens \(\[5, 11\]\)"):
        model.generate(ids, **{GENERATE_NAME: cache}, max_new_tokens=5, do_sample=False)


def test_only_what_is_asked_for_is_kept_and_told():
    _, model, ids = pair()
    settings = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    for asked, scores, logits in (("output_logits", False, True), ("output_scores", True, False)):
        seen = []
        watch = StoppingCriteriaList([lambda ids, scores, seen=seen: seen.append(scores) or torch.zeros(1).bool()])
        told = model.generate(ids, **settings, **{asked: True}, stopping_criteria=watch)
        assert ((told.scores is not None), (told.logits is not None)) == (scores, logits)
        assert all((given is not None) == scores for given in seen)


def test_a_cache_that_finds_no_room_is_left_as_transformers_made_it(monkeypatch):
    def full(*_):
        raise MemoryError("full")

    base, model, ids = pair()
    cache = DynamicCache(config=base.config)
    with monkeypatch.context() as patch:
        patch.setattr(written, "_longer", full)
        with pytest.raises(MemoryError):
            model.generate(ids, **{GENERATE_NAME: cache}, max_new_tokens=20, do_sample=False)
    longer = torch.cat([ids, prompt(3, seed=1)], dim=1)
    settings = {"attention_mask": torch.ones_like(longer), "max_new_tokens": 20, "do_sample": False}
    expected = base.generate(longer, **settings)
    assert torch.equal(base.generate(longer, **{GENERATE_NAME: cache}, **settings), expected)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("room", [1, 8, 64])
def test_memory_for_keys_and_values_grows_with_the_answer_and_forgets_what_left_a_window(room, family, monkeypatch):
    monkeypatch.setattr(written, "ROOM", room)
    base, model, ids = pair(family, tokens=100)
    settings = {"max_new_tokens": 100, "do_sample": False, "return_dict_in_generate": True}
    told, expected = model.generate(ids, **settings), base.generate(ids, **settings)
    assert torch.equal(told.sequences, expected.sequences)
    for mine, theirs in zip(told[GENERATE_NAME].layers, expected[GENERATE_NAME].layers, strict=True):
        assert type(mine) is type(theirs)
        assert mine.get_mask_sizes(1) == theirs.get_mask_sizes(1)
        torch.testing.assert_close(mine.keys, theirs.keys)
        torch.testing.assert_close(mine.values, theirs.values)


def test_memory_for_a_window_does_not_grow_with_the_answer(monkeypatch):
    monkeypatch.setattr(written, "ROOM", 8)
    rooms = set()

    class Watch:
        @hookimpl
        def observe(self, step):
            rooms.update(layer.room for layer in cache.layers)

    base = tiny("mistral")
    cache = DynamicCache(config=base.config)
    model = compose(base, prompt_tokens(), budget=6, plugins=[Watch()])
    model.generate(prompt(), **{GENERATE_NAME: cache}, max_new_tokens=100, do_sample=False)
    assert max(rooms) <= 1 + 15 + 2 * 8


def test_only_the_new_tokens_of_a_chat():
    base, _, ids = pair()
    turn = base.generate(ids, max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
    fresh = torch.cat([turn.sequences[:, -1:], prompt(4, seed=4)], dim=1)
    whole = torch.cat([turn.sequences, prompt(4, seed=4)], dim=1)
    seen = torch.ones_like(whole)
    expected = base.generate(whole, attention_mask=seen, max_new_tokens=10, do_sample=False)[:, whole.shape[1] :]
    lengths = []

    class Watch:
        @hookimpl
        def start(self, step):
            lengths.append((len(step.ids), step.length))

    model = compose(base, prompt_tokens(), budget=12, plugins=[Watch()])
    told = model.generate(
        fresh, attention_mask=seen, **continuing(turn),
        max_new_tokens=10, do_sample=False,
    )  # fmt: skip
    assert torch.equal(told[:, fresh.shape[1] :], expected)
    assert lengths == [(fresh.shape[1], whole.shape[1])]  # forwards are priced by what is cached


@pytest.mark.parametrize("chunk", [1, 5, 100])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_prefill_in_chunks(family, chunk):
    base, model, ids = pair(family)
    expected = base.generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False, prefill_chunk_size=chunk), expected)


def test_a_prompt_of_one_token():
    base, _, _ = pair()
    ids = torch.tensor([[5]])
    model = compose(base, prompt_tokens(), budget=16)
    same(base, model, ids, max_new_tokens=20, do_sample=False)


def test_generation_config_objects_and_defaults_of_the_model():
    base, model, ids = pair()
    config = GenerationConfig(max_new_tokens=15, do_sample=False, pad_token_id=0, repetition_penalty=1.2)
    same(base, model, ids, generation_config=config)
    assert config.max_new_tokens == 15
    model.generation_config.max_new_tokens = 3
    assert base.generation_config.max_new_tokens is None


def test_statistics_add_up():
    _, model, ids = pair()
    model.generate(ids, max_new_tokens=30, do_sample=False)
    stats = model.stats
    assert stats.tokens == 30
    assert 30 - stats.forwards <= sum(sum(depths.values()) for depths in stats.accepted.values())
    assert stats.forwards < 30
    assert sum(right for _, _, right in stats.claims) == 30 - stats.forwards
    assert all(0 <= claimed <= guesses for guesses, claimed, _ in stats.claims)
    assert set(stats.seconds) >= {"prefill", "propose oracle", "propose ppd", "merge", "fit", "verify", "accept"}
    assert stats.as_dict()["tokens_per_forward"] == pytest.approx(30 / stats.forwards)


def test_statistics_of_a_generation_that_is_broken_off_are_of_all_its_steps():
    class Stops(BaseStreamer):
        left = 25

        def put(self, value):
            self.left -= 1
            if not self.left:
                raise RuntimeError("enough")

        def end(self):
            pass

    _, model, ids = pair()
    with pytest.raises(RuntimeError, match="enough"):
        model.generate(ids, max_new_tokens=60, do_sample=False, streamer=Stops())
    stats = model.stats
    assert stats.forwards < stats.tokens <= 24
    assert sum(right for _, _, right in stats.claims) == stats.tokens - stats.forwards


def test_criteria_asked_as_numbers_end_a_sequence_where_those_of_transformers_do():
    class Odd(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] % 2 == 1

    ends = EosTokenCriteria([4, 6])
    for criteria in (
        [MaxLengthCriteria(9)],
        [ends],
        [ends, MaxLengthCriteria(9, 160), Odd()],
        [MaxLengthCriteria(9, 3)],
        [],
    ):
        theirs = StoppingCriteriaList(criteria)
        ours = Stops(theirs)
        for token in range(8):
            for length in (1, 8, 9, 10):
                ids = torch.full((1, length), token)
                assert ours(ids.clone, length, token, None) is bool(theirs(ids, None).all()), (criteria, token, length)
    assert [type(each) for each in Stops(StoppingCriteriaList([MaxLengthCriteria(9, 3)])).others] == [MaxLengthCriteria]


@pytest.mark.parametrize("padded", [False, True])
def test_experts_whose_routers_are_watched_while_training_decode_as_ever(padded):
    """The flag is saved with fine-tunes, and makes a forward compute a loss from its mask."""
    base = tiny("mixtral")
    base.config.output_router_logits = True
    ids = prompt()
    mask = torch.ones_like(ids)
    mask[:, : 3 * padded] = 0
    expected = base.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    model = compose(base, Oracle(expected[0, 3 * padded :].tolist(), lie=3), prompt_tokens(), budget=16)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False), expected)
    assert model.stats.tokens_per_forward > 1
    assert base.config.output_router_logits


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("how", [{}, {"remove_invalid_values": True}])
def test_what_a_model_says_that_is_no_number_is_decoded_as_by_generate(number, how):
    base = tiny(dtype=torch.float32)

    def spoil(module, args, out):
        return torch.cat([out[..., :5], torch.full_like(out[..., 5:6], number), out[..., 6:]], -1)

    base.lm_head.register_forward_hook(spoil)
    given = {"attention_mask": torch.ones_like(prompt()), "max_new_tokens": 12, "do_sample": False, **how}
    expected = base.generate(prompt(), **given)
    model = compose(base, prompt_tokens(), TokenRecycling(), budget=16)
    assert torch.equal(model.generate(prompt(), **given), expected)


def test_arguments_by_their_places_mean_what_they_mean_to_the_base():
    base, told = tiny(), []

    class Streamer(BaseStreamer):
        def put(self, value):
            told.append(value.tolist())

        def end(self):
            told.append("end")

    config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)
    outs, all_told = [], []
    for model in (base, compose(base, prompt_tokens(), budget=8)):
        outs.append(model.generate(prompt(), config, None, None, None, None, None, Streamer()))
        all_told.append(list(told))
        told.clear()
    assert torch.equal(*outs)
    assert all_told[0] == all_told[1]


@pytest.mark.parametrize("budget", [8, None])
def test_training_that_keeps_no_keys_is_refused_until_it_pauses(budget):
    base = tiny("gpt2")
    model = compose(base, prompt_tokens(), budget=budget)
    base.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(ValueError, match=r"nothing into its KV cache.*eval\(\)"):
        model.generate(prompt(), max_new_tokens=4, do_sample=False)
    model.eval()
    same(base, model, prompt(), max_new_tokens=4, do_sample=False)


def test_token_healing_by_the_models_own_config_is_refused_beside_a_config_that_is_silent():
    model = compose(tiny(), prompt_tokens(), budget=8)
    model.generation_config.token_healing = True
    silent, off = (GenerationConfig(max_new_tokens=3, **more) for more in ({}, {"token_healing": False}))
    with pytest.raises(ValueError, match="heal_tokens"):
        model.generate(prompt(), generation_config=silent)
    assert model.generate(prompt(), generation_config=off).shape[1] == prompt().shape[1] + 3


def test_positions_that_say_what_the_mask_says_are_taken():
    base = tiny()
    model = compose(base, prompt_tokens(), budget=8)
    ids, mask = prompt(), torch.ones(1, 12, dtype=torch.long)
    mask[0, :3] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    for given in ({"position_ids": torch.arange(12)[None]}, {"position_ids": places, "attention_mask": mask}):
        expected = base.generate(ids, max_new_tokens=9, do_sample=False, **given)
        assert torch.equal(model.generate(ids, max_new_tokens=9, do_sample=False, **given), expected)


def test_a_base_with_more_tokens_than_its_configuration_says_is_decoded_with():
    base = tiny()
    base.resize_token_embeddings(90, mean_resizing=False)
    with torch.no_grad():
        base.lm_head.weight[61:] = 1.5 * base.lm_head.weight[:29]
    base.config.vocab_size = 61
    expected = base.generate(prompt(), max_new_tokens=20, do_sample=False)
    assert expected.max() >= 61
    model = compose(base, prompt_tokens(), "recycling", Oracle(expected[0].tolist()), budget=16)
    assert torch.equal(model.generate(prompt(), max_new_tokens=20, do_sample=False), expected)


def test_a_class_of_compositions_makes_models_of_the_bases_own(tmp_path):
    base = tiny()
    model = compose(base, prompt_tokens(), budget=8)
    base.save_pretrained(tmp_path)
    for made in (type(model).from_pretrained(tmp_path, dtype=torch.float64), type(model)(base.config)):
        assert type(made) is type(base)
        made.generate(prompt(), max_new_tokens=3)
    expected = base.generate(prompt(), max_new_tokens=9, do_sample=False)
    beams = base.generate(prompt(), max_new_tokens=9, do_sample=False, num_beams=2)
    kind = type(base)
    assert torch.equal(kind.generate(model, prompt(), max_new_tokens=9, do_sample=False), expected)
    assert torch.equal(kind.generate(model, prompt(), max_new_tokens=9, do_sample=False, num_beams=2), beams)
