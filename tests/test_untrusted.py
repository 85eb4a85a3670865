"""Folders that nobody vouches for: mutated at random, cut off, linked elsewhere, killed while they were written."""

import copy
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_compose import tokenizer
from tiny import prompt_tokens, tiny
from typer.testing import CliRunner

from ppd_compose import PromptTokens, cli, load_drafter
from ppd_compose.identity import Identity

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
ODD = [
    None, True, -1, 0, 1.5, 2**31, 2**63, 10**400, float("nan"), float("inf"), "", "x", "../../etc/passwd", "/etc/x",
    [], [[]], [[0.5]], [[2.0]], [["x"]], {}, {"name": 1}, "a" * 10_000, [1] * 1000, "\x00", "model.embed_tokens/../x",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    made = prompt_tokens(3, 2)
    PromptTokens(made.embeddings, made.accuracy.tolist(), Identity.of(tiny()), {"steps": 3}).save_pretrained(folder)
    return folder


def keys(value, path=()):
    """Paths of all entries of nested objects."""
    for name, entry in value.items():
        yield (*path, name)
        if isinstance(entry, dict):
            yield from keys(entry, (*path, name))


def mutated_config(config, dice):
    told = json.loads(json.dumps(config))
    for _ in range(dice.choice([1, 1, 1, 2, 5])):
        path = dice.choice(list(keys(told)))
        place = told
        for name in path[:-1]:
            place = place[name]
        match dice.randrange(3):
            case 0:
                place[path[-1]] = copy.deepcopy(dice.choice(ODD))
            case 1:
                del place[path[-1]]
            case 2:
                place[f"{path[-1]}_more"] = copy.deepcopy(dice.choice(ODD))
        if not list(keys(told)):
            break
    return json.dumps(told).encode()


def mutated_header(content, dice):
    """A safetensors file whose header says something else."""
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    name = next(key for key in header if key != "__metadata__")
    match dice.randrange(6):
        case 0:
            header[name]["shape"] = dice.choice([[2**62, 2], [-1], [6, 31], [], [6, 32, 1], [0, 32], "six"])
        case 1:
            header[name]["dtype"] = dice.choice(["F16", "I64", "BOOL", "F8_E4M3", "nonsense", 3])
        case 2:
            header[name]["data_offsets"] = dice.choice([[0, 2**63], [-1, 5], [5, 1], [0, 0], [10, 778], "all"])
        case 3:
            header[dice.choice(["other", "../../escape", "x.ppd_embeddings"])] = header.pop(name)
        case 4:
            header["second.ppd_embeddings"] = header[name]
        case 5:
            header["__metadata__"] = dice.choice(
                [{}, {CONFIG: "[]"}, {CONFIG: 3}, {CONFIG: "{"}, "text", {"a": "b" * 99_999}]
            )
    told = json.dumps(header).encode()
    length = dice.choice([len(told), len(told), len(told), 2**63, 0, 5])
    return struct.pack("<Q", length) + told + data


def mutated_bytes(content, dice):
    match dice.randrange(4):
        case 0:
            return content[: dice.randrange(len(content))]
        case 1:
            at = dice.randrange(len(content))
            return content[:at] + dice.randbytes(dice.randrange(1, 20)) + content[at + 5 :]
        case 2:
            return dice.randbytes(dice.randrange(200))
        case _:
            return b"\x80\x04cposix\nsystem\n(S'touch escaped'\ntR."


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
                theirs = mutated_header(tensors, dice)
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


def reference(folder, rows, **changes):
    """An adapter as the PPD authors' code writes it."""
    folder.mkdir(exist_ok=True)
    told = {
        "base_model_name_or_path": "lmsys/vicuna-7b-v1.3", "num_special_tokens": 3, "num_virtual_tokens": len(rows),
        "virtual_tokens_per_special_token": 2, "token_dim": 32, "vt_attention_type": "ensemble", "num_exits": 1,
        "aggregation_type": "mean", "use_custom_lm_head": False, "use_prefix_tuning": False, "task_type": None,
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps({**told, **changes}))
    save_file({"prompt_embeddings": rows}, folder / TENSORS)


@pytest.mark.parametrize("peft_type", [None, "PROMPT_TUNING"])
@pytest.mark.parametrize("pickled", [False, True])
def test_adapters_of_the_authors_code_are_read_and_not_changed(tmp_path, peft_type, pickled):
    rows = torch.arange(6 * 32.0).view(6, 32)
    reference(tmp_path / "old", rows, **({"peft_type": peft_type} if peft_type else {}))
    if pickled:
        (tmp_path / "old" / TENSORS).unlink()
        torch.save({"prompt_embeddings": rows}, tmp_path / "old" / "adapter_model.bin")
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    for load in (PromptTokens.from_pretrained, load_drafter):
        found = load(tmp_path / "old")
        assert torch.equal(found.embeddings, rows.view(3, 2, 32))
        assert found.identity is None
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before


def test_convert_makes_them_adapters_of_this_project(tmp_path):
    base = tiny(dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    rows = torch.arange(6 * 32.0).view(6, 32)
    reference(tmp_path / "old", rows)
    words = ["convert", tmp_path / "old", "--out", tmp_path / "new", "--base", tmp_path / "base"]
    assert CliRunner().invoke(cli.app, [str(word) for word in words], catch_exceptions=False).exit_code == 0
    found = PromptTokens.from_pretrained(tmp_path / "new")
    assert torch.equal(found.embeddings, rows.view(3, 2, 32))
    assert found.identity.fingerprint == Identity.of(base).fingerprint
    assert not found.measured
    assert "Not measured." in (tmp_path / "new" / "README.md").read_text()
    with pytest.raises(ValueError, match="is an adapter of this project already"):
        CliRunner().invoke(cli.app, ["convert", str(tmp_path / "new"), *map(str, words[2:])], catch_exceptions=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_prefix_tuning": True}, "it uses prefix tuning"),
        ({"use_custom_lm_head": True}, "an output head of its own"),
        ({"num_exits": 2}, "it uses 2 exits"),
        ({"aggregation_type": "weighted"}, "aggregated by 'weighted'"),
        ({"vt_attention_type": "decoder"}, "attend as 'decoder'"),
        ({"num_special_tokens": 0}, "num_special_tokens must be a whole number"),
        ({"num_special_tokens": 5}, r"promises 5 prompt tokens of 2 embeddings, the tensor is \(6, 32\)"),
    ],
)
def test_what_the_authors_code_can_hold_beyond_ppd_is_refused_by_name(tmp_path, changes, message):
    reference(tmp_path, torch.zeros(6, 32), **changes)
    with pytest.raises(ValueError, match=message):
        PromptTokens.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"), [("custom_lm_head.pt", "output head"), ("weighting_layers.pt", "weighted")]
)
def test_files_beside_the_embeddings_are_refused_by_name(tmp_path, name, message):
    reference(tmp_path, torch.zeros(6, 32))
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"{name} holds .*{message}"):
        PromptTokens.from_pretrained(tmp_path)


def test_a_pickle_that_is_more_than_tensors_is_not_executed(tmp_path):
    reference(tmp_path / "old", torch.zeros(6, 32))
    (tmp_path / "old" / TENSORS).unlink()
    torch.save({"prompt_embeddings": Path("evil")}, tmp_path / "old" / "adapter_model.bin")
    with pytest.raises(ValueError, match="no whole file of tensors"):
        PromptTokens.from_pretrained(tmp_path / "old")


SAVES = """
import os, sys, torch
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
save()
print("ready", flush=True)
for _ in sys.stdin:
    writer = os.fork()
    while not writer:
        save()
    print(writer, flush=True)
    os.waitpid(writer, 0)
"""


def test_a_save_that_is_killed_leaves_what_was_or_what_comes(tmp_path):
    """A hundred times, at random moments: never a mixture, never a folder that does not load."""
    dice, folder, seen = random.Random(0), tmp_path / "adapter", []
    words = [sys.executable, "-c", SAVES, str(folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as saves:
        assert saves.stdout.readline() == "ready\n"
        for _ in range(100):
            saves.stdin.write("again\n")
            writer = int(saves.stdout.readline())
            time.sleep(0.01 + 0.05 * dice.random())
            os.kill(writer, signal.SIGKILL)
            found = PromptTokens.from_pretrained(folder)
            n = len(found.embeddings)
            assert found.embeddings.unique().tolist() == [float(n)]
            assert found.accuracy.tolist() == [[0.1 * n]] * n
            assert found.training == {"steps": n}
            seen.append(n)
        saves.stdin.close()
    assert min(seen.count(1), seen.count(2)) > 5
