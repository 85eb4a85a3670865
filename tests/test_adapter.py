"""Adapters as files: round trips, and what a damaged, foreign or dangerous one gets."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny import prompt, prompt_tokens, tiny

from ppd_compose import PromptTokens, compose
from ppd_compose.identity import Identity
from ppd_compose.storage import staged_file, staged_folder

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def saved(tmp_path):
    """Prompt tokens for the tiny Llama, and the folder they were saved to."""
    made = prompt_tokens(3, 2)
    tokens = PromptTokens(made.embeddings, made.accuracy.tolist(), Identity.of(tiny()))
    tokens.save_pretrained(tmp_path / "adapter")
    return tokens, tmp_path / "adapter"


def edit(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_round_trip_is_bit_for_bit(saved):
    tokens, folder = saved
    again = PromptTokens.from_pretrained(folder)
    assert torch.equal(again.embeddings, tokens.embeddings)
    assert (again.accuracy == tokens.accuracy).all()
    assert again.identity == tokens.identity
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", CONFIG, TENSORS]
    config = json.loads((folder / CONFIG).read_text())
    assert (config["peft_type"], config["num_prompt_tokens"], config["ensemble"]) == ("PPD", 3, 2)


def test_saving_over_an_adapter_replaces_it(saved):
    tokens, folder = saved
    PromptTokens(tokens.embeddings[:1], tokens.accuracy[:1].tolist(), tokens.identity).save_pretrained(folder)
    assert PromptTokens.from_pretrained(folder).embeddings.shape == (1, 2, 32)


def test_without_an_identity_nothing_is_saved(tmp_path):
    with pytest.raises(ValueError, match="identity"):
        prompt_tokens().save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_another_base_is_refused_and_other_weights_are_warned_of(saved):
    _, folder = saved
    tokens = PromptTokens.from_pretrained(folder)
    compose(tiny(), tokens)
    with pytest.warns(UserWarning, match="same shapes but other weights"):
        model = compose(tiny(seed=1), tokens, budget=8)
    expected = tiny(seed=1).generate(prompt(), max_new_tokens=10, do_sample=False)
    assert torch.equal(model.generate(prompt(), max_new_tokens=10, do_sample=False), expected)
    edit(folder, base={**json.loads((folder / CONFIG).read_text())["base"], "vocab_size": 99, "name": "org/other"})
    with pytest.raises(ValueError, match=r"org/other \(hidden 32, vocabulary 99\).*hidden 32, vocabulary 61"):
        compose(tiny(), PromptTokens.from_pretrained(folder))


def test_the_same_weights_in_bfloat16_are_no_other_weights(saved):
    _, folder = saved
    compose(tiny(dtype=torch.bfloat16), PromptTokens.from_pretrained(folder))


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_missing_file_is_named(saved, name):
    _, folder = saved
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        PromptTokens.from_pretrained(folder)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        PromptTokens.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 4, 60, -8])
def test_a_truncated_tensor_file(saved, keep):
    _, folder = saved
    whole = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=rf"{TENSORS} is no whole file of tensors \(.+\): fetch or save it again"):
        PromptTokens.from_pretrained(folder)


def test_a_pickle_is_not_opened(saved):
    _, folder = saved
    (folder / TENSORS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(FileNotFoundError, match="is a pickle and is not opened"):
        PromptTokens.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LORA"}, "peft_type is 'LORA'"),
        ({"format_version": 99}, "format 99"),
        ({"num_prompt_tokens": 0}, "num_prompt_tokens must be a whole number of at least 1, got 0"),
        ({"ensemble": 0}, "ensemble must be"),
        ({"ensemble": "2"}, "ensemble must be"),
        ({"num_prompt_tokens": 2}, "belong to different adapters"),
        ({"accuracy": [[0.5]]}, "accuracy must be 3 rows"),
        ({"accuracy": [[1.5]] * 3}, "shares between 0 and 1"),
        ({"accuracy": "high"}, "accuracy"),
        ({"base": {"name": "x"}}, "lacks a field"),
        ({"base": "x"}, "lacks a field"),
    ],
)
def test_a_wrong_config_says_what_is_wrong(saved, changes, message):
    _, folder = saved
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message):
        PromptTokens.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_config_that_is_no_config(saved, text):
    _, folder = saved
    (folder / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=CONFIG):
        PromptTokens.from_pretrained(folder)


def test_rows_of_nan_and_of_another_kind(saved):
    _, folder = saved
    key = "base_model.model.model.embed_tokens.ppd_embeddings"
    edit(folder, digest=None)  # as PEFT leaves it
    save_file({key: torch.full((6, 32), float("nan"))}, folder / TENSORS)
    with pytest.raises(ValueError, match="NaN"):
        PromptTokens.from_pretrained(folder)
    save_file({key: torch.zeros(6, 32, dtype=torch.int64)}, folder / TENSORS)
    with pytest.raises(ValueError, match="one matrix of floats"):
        PromptTokens.from_pretrained(folder)
    save_file({"other": torch.zeros(6, 32)}, folder / TENSORS)
    with pytest.raises(ValueError, match="it holds"):
        PromptTokens.from_pretrained(folder)


@pytest.mark.parametrize("shape", [(0, 1, 32), (1, 0, 32), (3, 32)])
def test_no_prompt_tokens_or_no_embeddings(shape):
    with pytest.raises(ValueError, match="n, v >= 1"):
        PromptTokens(torch.zeros(shape))


def test_a_failed_write_leaves_what_was_there(tmp_path):
    (tmp_path / "file").write_text("before")

    def fails(stage, name):
        with stage as staging:
            (staging / name if name else staging).write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails(staged_file(tmp_path / "file"), "")
    with pytest.raises(RuntimeError):
        fails(staged_folder(tmp_path / "folder"), "part")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "before")]


def test_a_source_that_can_be_neither_folder_nor_hub_id_is_told():
    with pytest.raises(FileNotFoundError, match="'my adapter' is no folder here, and cannot be a Hub id"):
        PromptTokens.from_pretrained("my adapter")
