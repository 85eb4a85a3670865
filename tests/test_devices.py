"""Bases that are not on the CPU: nothing is left behind on the host, launched or recorded, and few copies are made."""

import warnings

import pytest
import simulated
import test_eagle_train
import test_medusa
import test_train
import torch
from ppd_compose.integrations.draft_model import DraftModel
from ppd_compose.integrations.medusa import MedusaHeads
from simulated import KIND, Simulated, copied
from test_eagle_train import replies
from test_medusa import random_heads
from test_prompt_heads import prompt_heads
from test_recorded import Tape, record_as_they_are
from test_together import MAKERS
from tiny import Oracle, continuing, prompt, prompt_tokens, tiny

from ppd_compose import compose
from ppd_compose.alternatives import AlwaysAsk
from ppd_compose.device import bringing
from ppd_compose.testing import check_drafter

pytestmark = pytest.mark.skipif(not simulated.HERE, reason="this torch knows no devices in Python")

DRAFTERS = {
    **MAKERS,
    "draft-chain": lambda base: DraftModel(tiny("llama", seed=5, dtype=base.dtype).to(base.device)),
    "ensembles": lambda base: prompt_tokens(3, 3),
    "heads-that-read": lambda base: MedusaHeads(random_heads(), prompt_heads=prompt_heads(prompt_tokens())),
    "and-ensembles": lambda base: MedusaHeads(random_heads(), prompt_heads=prompt_heads(prompt_tokens(3, 3))),
}


class TapeThere(Tape):
    """Refuses copies to and fro too, as they would be done once."""

    within = torch.no_grad

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        before = copied.total()
        out = super().__torch_dispatch__(operation, types, args, kwargs)
        if copied.total() != before:
            raise RuntimeError(f"{operation} within a recording is given something of the host")
        return out


@pytest.fixture(autouse=True)
def there(monkeypatch):
    """The device; what is compiled is recorded there as it is."""
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    record_as_they_are(monkeypatch, KIND, TapeThere)
    with Simulated(), warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def composed(family, *names, compile=False, others=(), **settings):
    """A composition of a base that is there, and the same base on the CPU."""
    base, moved = (tiny(family, dtype=torch.float32, **settings) for _ in range(2))
    moved.to(KIND)
    drafters = [DRAFTERS[name](moved) for name in names]
    return base, compose(moved, *drafters, *others, budget=16, compile=compile, plugins=[AlwaysAsk()])


def same(base, model, ids, tokens=20, **how):
    """Both say the same; what `model` told."""
    told = []
    for each, given in ((base, ids), (model, ids.to(KIND))):
        mine = {
            name: value.to(given.device) if isinstance(value, torch.Tensor) else value for name, value in how.items()
        }
        torch.manual_seed(0)
        told.append(each.generate(given, max_new_tokens=tokens, return_dict_in_generate=True, **mine))
    assert told[1].sequences.device.type == KIND
    assert torch.equal(told[0].sequences, told[1].sequences.cpu())
    return told


def oracle(family, ids):
    base = tiny(family, dtype=torch.float32)
    return Oracle(base.generate(ids, max_new_tokens=20, do_sample=False)[0].tolist())


def test_operands_on_different_devices_are_refused():
    one = torch.ones(3)
    with pytest.raises(RuntimeError, match="on one device"):
        one + one.to(KIND)
    with pytest.raises(TypeError, match="copied to the host"):
        one.to(KIND).numpy()


def test_what_lies_on_several_devices_comes_in_one_copy_too():
    given = torch.arange(3).to(KIND), torch.tensor([True]), torch.rand(2, 2).to(KIND)
    copied.clear()
    bring = bringing(*given)
    assert copied["down"] == 0
    for mine, theirs in zip(bring(), given, strict=True):
        assert torch.equal(mine, theirs.cpu())
    assert copied["down"] == 3  # the two above are looked at here


@pytest.mark.parametrize("name", ["ppd", "recycling"])  # what the others compute there is tried below
def test_drafters_pass_their_checks(name):
    check_drafter(DRAFTERS[name], tiny(dtype=torch.float32).to(KIND))


@pytest.mark.parametrize(("family", "compile"), [("llama", False), ("llama", True), ("gemma3", True), ("gpt2", False)])
@pytest.mark.parametrize("name", DRAFTERS)
def test_every_drafter_and_a_chat_that_goes_on(name, family, compile):
    ids = prompt()
    base, model = composed(family, name, compile=compile, others=[oracle(family, ids)])
    told = same(base, model, ids, do_sample=False)
    assert model.stats.forwards < 18
    assert bool(Tape.played) == compile
    whole = torch.cat([told[0].sequences, prompt(5, seed=1)], dim=1)
    expected = base.generate(whole, attention_mask=torch.ones_like(whole), max_new_tokens=9, do_sample=False)
    mask = torch.ones_like(whole).to(KIND)
    out = model.generate(whole.to(KIND), attention_mask=mask, max_new_tokens=9, do_sample=False, **continuing(told[1]))
    assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": True, "top_p": 0.9},
        {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"do_sample": False, "prefill_chunk_size": 4},
        {"do_sample": False, "guidance_scale": 1.5},
        {"do_sample": False, "eos_token_id": [3, 9], "output_scores": True, "output_logits": True},
    ],
    ids=lambda how: list(how)[1],
)
def test_all_together_behind_padding(how, compile):
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt()], dim=1)
    names = [name for name in DRAFTERS if name not in ("ensembles", "medusa", "and-ensembles", "draft-chain")]
    base, model = composed("llama", *names, compile=compile)
    same(base, model, ids, attention_mask=(ids != 0).long(), **how)


def test_a_prompt_on_the_host_of_a_base_that_is_not():
    base, model = composed("llama", "ppd", "lookup")
    warnings.simplefilter("ignore")  # transformers says that it is slow
    told = model.generate(prompt(), max_new_tokens=12, do_sample=False)
    assert torch.equal(told, base.generate(prompt(), max_new_tokens=12, do_sample=False))


@pytest.mark.parametrize("course", [test_train, test_medusa, test_eagle_train], ids=lambda course: course.__name__)
def test_training_gives_the_same_there(course, tmp_path, monkeypatch):
    told = replies(tiny(dtype=torch.float32))
    monkeypatch.setattr(course, "replies", lambda base: told)
    base, moved = tiny(dtype=torch.float32), tiny(dtype=torch.float32).to(KIND)
    here, there = course.trained(base, tmp_path / "here"), course.trained(moved, tmp_path / "there")
    assert tensors(here)
    for mine, theirs in zip(tensors(here), tensors(there), strict=True):
        torch.testing.assert_close(mine.cpu(), theirs.cpu())


def tensors(trained):
    """Those of a dataclass, or of the first of several, or of a dictionary within."""
    parts = vars(trained[0] if isinstance(trained, tuple) else trained).values()
    flat = [one for part in parts for one in (part.values() if isinstance(part, dict) else [part])]
    return [one for one in flat if isinstance(one, torch.Tensor)]


# Of a step: what goes up at most, and what comes down: picks, and with them what drafters guess. One more comes down of
# ensembles, of which the budget may leave a part; and of heads that read prompt tokens where none hangs from the last
# accepted node. An EAGLE head's draft goes up and comes down in one copy more. A draft model is told each of its
# forwards, and tells each, but those of a chain all at once.
STEPS = {
    (): (1, 1),
    ("lookup", "ngram"): (1, 1),
    ("ppd",): (1, 1),
    ("medusa",): (1, 1),
    ("ppd", "heads-that-read", "lookup", "ngram"): (1, 1.15),
    ("ppd", "medusa", "recycling", "lookup", "ngram"): (1, 1),
    ("recycling",): (1, 1),
    ("ensembles", "and-ensembles"): (1, 2),
    ("eagle",): (2, 2),
    ("draft-chain",): (5, 2),
    ("draft-model",): (5, 5),
}


@pytest.mark.parametrize("compile", [False, True], ids=["launched", "recorded"])
@pytest.mark.parametrize("names", STEPS, ids="+".join)
def test_few_copies_go_to_and_fro_in_a_step(names, compile):
    ids, tokens = prompt(), 20
    _, model = composed("llama", *names, compile=compile)
    found = []
    for length in (tokens, 2 * tokens):  # less what a generation takes beside its steps
        for _ in range(3):  # by the last time all is recorded
            copied.clear()
            model.generate(ids.to(KIND), max_new_tokens=length, do_sample=False, eos_token_id=None)
        found.append((copied["up"], copied["down"], model.stats.forwards))
    up, down, forwards = (more - less for less, more in zip(*found, strict=True))
    most_up, most_down = STEPS[names]
    assert forwards <= up <= most_up * forwards
    assert forwards <= down <= most_down * forwards
