"""Adapters of the PPD authors' own code: read, converted, and refused by name where they hold more than PPD."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_compose import tokenizer
from tiny import tiny
from typer.testing import CliRunner

from ppd_compose import PromptTokens, cli, load_drafter
from ppd_compose.identity import Identity

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


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
