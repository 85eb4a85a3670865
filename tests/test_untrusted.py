"""Folders that nobody vouches for: mutated at random, cut off, linked elsewhere, killed while they were written."""

import json
import random
import tracemalloc

import pytest
import torch
from killed import killed
from mutations import mutated_bytes, mutated_config, mutated_header
from tiny import prompt_tokens, tiny

from ppd_compose import PromptTokens, load_drafter
from ppd_compose.identity import Identity

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module", params=[None, torch.ones(3, 2, 2, 1, 8)], ids=["plain", "prefix"])
def whole(request, tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("whole"), prompt_tokens(3, 2)
    tokens = PromptTokens(made.embeddings, made.accuracy.tolist(), Identity.of(tiny()), {"steps": 3}, request.param)
    tokens.save_pretrained(folder)
    return folder


def test_a_thousand_mutated_adapters_load_or_are_refused_in_words(whole, tmp_path, monkeypatch):
    """No crash, no code executed, nothing written elsewhere."""
    monkeypatch.chdir(tmp_path)
    config, tensors = (whole / CONFIG).read_bytes(), (whole / TENSORS).read_bytes()
    dice, folder, refused = random.Random(0), tmp_path / "adapter", []
    folder.mkdir()
    for number in range(1000):
        mine, theirs = config, tensors
        match number % 4:
            case 0 | 1:
                mine = mutated_config(json.loads(config), dice)
            case 2:
                theirs = mutated_header(tensors, dice, CONFIG)
            case 3 if number % 8 == 3:
                mine = mutated_bytes(config, dice)
            case 3:
                theirs = mutated_bytes(tensors, dice)
        (folder / CONFIG).write_bytes(mine)
        (folder / TENSORS).write_bytes(theirs)
        load = dice.choice([PromptTokens.from_pretrained, load_drafter])
        try:
            found = load(folder)
            assert isinstance(found, PromptTokens)
            assert found.embeddings.shape[2] == 32
        except (ValueError, OSError) as error:
            refused.append(str(error))
    assert len(refused) > 500
    assert all(refused)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, TENSORS]


def test_memory_is_bounded_by_the_size_of_the_file(whole, tmp_path):
    """Whatever sizes are promised."""
    for name in (CONFIG, TENSORS):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    told = json.loads((tmp_path / CONFIG).read_text())
    told.update(num_prompt_tokens=10**9)
    (tmp_path / CONFIG).write_text(json.dumps(told))
    tracemalloc.start()
    with pytest.raises(ValueError, match="is more than 256"):
        PromptTokens.from_pretrained(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_links_to_other_places_are_only_read(whole, tmp_path):
    (tmp_path / TENSORS).symlink_to(whole / TENSORS)
    (tmp_path / CONFIG).symlink_to("/dev/null")
    with pytest.raises(FileNotFoundError, match=CONFIG):
        PromptTokens.from_pretrained(tmp_path)


SAVES = """
import torch
from pathlib import Path
from ppd_compose.adapter import Adapter, write_adapter
from ppd_compose.identity import Identity
adapters = [
    Adapter(torch.full((n, 1, 8), float(n)), [[0.1 * n]] * n, Identity("base", 8, 99, "print"), {"steps": n})
    for n in (1, 2)
]
def save():
    for adapter in adapters:
        write_adapter(adapter, Path(sys.argv[1]), f"card {len(adapter.embeddings)}")
"""


def test_a_save_that_is_killed_leaves_what_was_or_what_comes(tmp_path):
    """A hundred times, at random moments: never a mixture, never a folder that does not load."""
    seen = []
    for _ in killed(SAVES, tmp_path, longest=0.06):
        found = PromptTokens.from_pretrained(tmp_path)
        n = len(found.embeddings)
        assert found.embeddings.unique().tolist() == [float(n)]
        assert found.accuracy.tolist() == [[0.1 * n]] * n
        assert found.training == {"steps": n}
        seen.append(n)
    assert min(seen.count(1), seen.count(2)) > 5
