"""Prompts and answers at the ends of what a model has positions for."""

import pytest
import torch
import transformers
from tiny import GROUPED, Oracle, continuing, prompt, prompt_tokens, tiny

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
