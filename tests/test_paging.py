"""Weights that lie in a file: what packing them leaves in memory, and that nothing is changed or lost."""

import platform
import re
import sys
from pathlib import Path

import pytest
import torch
from test_forward import answer, needs_packing
from tiny import prompt_tokens, tiny
from transformers import AutoModelForCausalLM

from ppd_compose import compose
from ppd_compose.paging import give_back, page_out

linux = pytest.mark.skipif(sys.platform != "linux", reason="pages are told by Linux only")


def resident(path):
    """KiB of the file that lie in this process's memory."""
    told = Path("/proc/self/smaps").read_text().split(str(path.resolve()))[1:]
    return sum(int(re.search(r"\nRss: +(\d+)", part).group(1)) for part in told)


def resident_in_all():
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


def mapped(path, numbers=1 << 20):
    torch.arange(numbers, dtype=torch.float32).numpy().tofile(path)
    return torch.from_file(str(path), shared=False, size=numbers, dtype=torch.float32)


@pytest.fixture
def taken(tmp_path):
    """Skips where the system does not take advice."""
    states = mapped(tmp_path / "advice")
    states.sum()
    page_out(states)
    if resident(tmp_path / "advice") > 64:
        pytest.skip("this system does not give pages back")


@linux
def test_pages_go_and_come_back_with_the_same_numbers(tmp_path, taken):
    states = mapped(tmp_path / "states")
    expected = states.clone()
    assert resident(tmp_path / "states") >= 4000
    page_out(states)
    assert resident(tmp_path / "states") <= 64
    assert torch.equal(states, expected)


def test_what_was_written_is_kept(tmp_path):
    states = mapped(tmp_path / "states")
    states[:5000] = -1.0
    page_out(states)
    expected = torch.arange(1 << 20, dtype=torch.float32)
    assert torch.equal(states[5000:], expected[5000:])
    assert (states[:5000] == -1.0).all()


@linux
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others give back by themselves, or not at all")
def test_what_was_freed_between_things_in_use_goes_back():
    blocks = [torch.ones(16_000) for _ in range(600)]
    pinned = blocks[::20]
    del blocks
    before = resident_in_all()
    give_back()
    assert resident_in_all() < before - 20_000
    assert all(float(each.sum()) == 16_000 for each in pinned)


@pytest.mark.parametrize("states", [torch.ones(3), torch.ones(1 << 20), torch.ones(64, 64).t(), torch.empty(0)])
def test_other_tensors_are_left_alone(states):
    expected = states.clone()
    page_out(states)
    assert torch.equal(states, expected)


@linux
@needs_packing
def test_a_packed_composition_holds_the_weights_of_a_file_once(tmp_path, taken):
    tiny(dtype=torch.bfloat16, hidden_size=256, intermediate_size=4096).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    expected = answer(base)
    before = resident(tmp_path / "model.safetensors")
    model = compose(base, prompt_tokens(hidden=256), budget=8, packed=True)
    assert torch.equal(answer(model), expected)
    assert resident(tmp_path / "model.safetensors") < before / 4
    assert torch.equal(answer(base), expected)
