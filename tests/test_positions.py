"""Prompts and answers at the ends of what a model has positions for."""

import copy

import pytest
import torch
import transformers
from tiny import GROUPED, Oracle, continuing, prompt, prompt_tokens, tiny
from transformers import LlamaForCausalLM

from ppd_compose import compose


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("length", [150, 159, 160])
def test_an_answer_goes_on_behind_the_last_position_as_that_of_generate(family, length):
    base, ids = tiny(family), prompt(length)
    expected = base.generate(ids, max_new_tokens=16, do_sample=False)
    right = Oracle(expected[0].tolist())
    model = compose(base, prompt_tokens(), right, "recycling", budget=12)
    assert torch.equal(model.generate(ids, max_new_tokens=16, do_sample=False), expected)


def test_padding_takes_no_positions():
    base, ids = tiny(), prompt(12)
    padded = torch.cat([torch.zeros_like(prompt(150)), ids], 1)
    mask = torch.cat([torch.zeros(1, 150), torch.ones(1, 12)], 1).long()
    settings = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    model = compose(base, prompt_tokens(), "recycling", budget=12)
    assert torch.equal(model.generate(padded, **settings), base.generate(padded, **settings))
    assert model.stats.rows_per_forward > 2


def test_a_text_that_may_outgrow_the_short_rotary_factors_is_refused():
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32, "factor": 5.0,
        "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    }  # fmt: skip
    config = transformers.Phi3Config(
        **GROUPED, pad_token_id=0, rope_parameters=rope, original_max_position_embeddings=32
    )
    torch.manual_seed(0)
    base = transformers.Phi3ForCausalLM(config).eval().double()
    base.generation_config = transformers.GenerationConfig(pad_token_id=0, bos_token_id=1)
    model = compose(base, prompt_tokens(), budget=12)
    with pytest.raises(ValueError, match=r"behind 32 tokens.*may reach 34: lower max_new_tokens"):
        model.generate(prompt(12), max_new_tokens=22, do_sample=False)
    for length, tokens in ((12, 21), (40, 20)):
        settings = {"max_new_tokens": tokens, "do_sample": False}
        assert torch.equal(model.generate(prompt(length), **settings), base.generate(prompt(length), **settings))
    turn = model.generate(prompt(12), max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="behind 32 tokens"):  # the base would throw such a cache away
        model.generate(prompt(40), **continuing(turn), max_new_tokens=8, do_sample=False)


def placing(change):
    """A Llama whose class changes its positions, as `change` says, before each forward of `generate`."""

    class Placing(LlamaForCausalLM):
        def prepare_inputs_for_generation(self, *args, **kwargs):
            prepared = super().prepare_inputs_for_generation(*args, **kwargs)
            return {**prepared, "position_ids": change(prepared["position_ids"])}

    base = tiny()
    base.__class__ = Placing
    return base


def test_tokens_stand_where_the_class_of_the_base_places_them():
    """As PaliGemma's, which counts from 1: seen in a chat that goes on from the base's own keys."""
    base, ids = placing(lambda places: places + 5), prompt()
    turn = base.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([turn.sequences, prompt(9, seed=1)], 1)
    settings = {"attention_mask": torch.ones_like(longer), "max_new_tokens": 20, "do_sample": False}
    expected = base.generate(longer, **continuing(copy.deepcopy(turn)), **settings)
    model = compose(base, prompt_tokens(), Oracle(expected[0].tolist()), budget=12)
    assert torch.equal(model.generate(longer, **continuing(turn), **settings), expected)
    assert model.stats.tokens_per_forward > 2


def test_a_class_that_stretches_positions_is_refused():
    model = compose(placing(lambda places: 2 * places), prompt_tokens(), budget=12)
    with pytest.raises(ValueError, match=r"Placing places the last token at \[22\], behind 11 others"):
        model.generate(prompt(), max_new_tokens=8, do_sample=False)


def test_a_class_that_leaves_places_to_its_forward_serves_where_columns_are_counted():
    base, ids = placing(lambda places: None), prompt()
    model, settings = compose(base, prompt_tokens(), budget=12), {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(model.generate(ids, **settings), base.generate(ids, **settings))
    padded, mask = (torch.nn.functional.pad(each, (3, 0)) for each in (ids, torch.ones_like(ids)))
    settings["attention_mask"] = mask
    assert torch.equal(model.generate(padded, **settings), base.generate(padded, **settings))
    mask[0, 7] = 0
    with pytest.raises(ValueError, match="Placing places tokens by itself, in a way that"):
        model.generate(padded, **settings)


def test_learnt_positions_are_counted_by_columns_where_generate_tells_none():
    base = tiny("gpt2")
    base._prepare_position_ids_for_generation = lambda *_: None
    ids, mask = (torch.nn.functional.pad(each, (3, 0)) for each in (prompt(), torch.ones_like(prompt())))
    settings = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    expected = base.generate(ids, **settings)
    model = compose(base, prompt_tokens(), Oracle(expected[0].tolist()), budget=12)
    assert torch.equal(model.generate(ids, **settings), expected)
