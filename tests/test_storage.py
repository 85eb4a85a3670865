"""Who may read what is saved, where it is kept, and what a full disk leaves."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ppd_compose.integrations.medusa import MedusaHeads
from test_medusa import random_heads
from tiny import prompt_tokens, tiny

from ppd_compose import PromptTokens, load_drafter, tensor_files
from ppd_compose.identity import Identity
from ppd_compose.storage import cache_folder, staged_folder
from ppd_compose.tensor_files import tensors_in


@pytest.mark.skipif(os.name == "nt", reason="no such modes")
def test_what_is_saved_is_as_open_as_its_user_makes_files(tmp_path):
    """In a process of its own, as the mask is one for all threads."""
    modes = {0o027: 0o640, 0o022: 0o644, 0o077: 0o600}
    script = (
        f"import os, sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from tiny import prompt_tokens, tiny\n"
        "from ppd_compose.identity import Identity\n"
        "tokens = prompt_tokens(); tokens.identity = Identity.of(tiny())\n"
        f"for mask in {list(modes)}: os.umask(mask); tokens.save_pretrained({str(tmp_path)!r} + f'/{{mask}}')"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    for mask, mode in modes.items():
        assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / str(mask)).iterdir()} == {mode}


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("PPD_COMPOSE_HOME", "~/mine")
    assert cache_folder() == Path.home() / "mine"
    monkeypatch.setenv("PPD_COMPOSE_HOME", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == Path.home() / ".cache" / "ppd_compose"


def test_a_full_disk_is_told_with_the_file_and_leaves_what_was_there(tmp_path):
    resource = pytest.importorskip("resource")
    tokens = prompt_tokens()
    tokens.identity = Identity.of(tiny())
    tokens.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, most))
    try:
        with pytest.raises(OSError, match=r"adapter_model.safetensors cannot be written .*another folder"):
            tokens.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert PromptTokens.from_pretrained(tmp_path).identity == tokens.identity


def test_an_empty_folder_is_filled_where_no_folder_is_replaced(tmp_path, monkeypatch):
    """As on Windows."""
    rename = Path.rename

    def renamed(path, target):
        if Path(target).exists():
            raise FileExistsError(target)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renamed)
    (tmp_path / "empty").mkdir()
    with staged_folder(tmp_path / "empty") as staging:
        (staging / "file").write_text("text")
    assert (tmp_path / "empty" / "file").read_text() == "text"
    with pytest.raises(OSError, match="not empty"), staged_folder(tmp_path / "empty"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert (tmp_path / "empty" / "file").read_text() == "text"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells which files are in use")
def test_a_file_that_was_read_may_be_replaced_as_nothing_holds_it(tmp_path, monkeypatch):
    """Windows lets no file be replaced of which something is in use."""
    monkeypatch.setattr(tensor_files, "HOLDS", True)
    tokens = prompt_tokens()
    tokens.identity = Identity.of(tiny())
    tokens.save_pretrained(tmp_path / "ppd")
    MedusaHeads(random_heads()).save_pretrained(tmp_path / "medusa")
    torch.save({"weight": torch.randn(40, 40)}, tmp_path / "heads.pt")
    held = [load_drafter(tmp_path / "ppd"), load_drafter(tmp_path / "medusa"), tensors_in(tmp_path / "heads.pt")]
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert len(held) == 3
