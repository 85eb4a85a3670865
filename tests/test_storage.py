"""Who may read what is saved, where it is kept, and what a full disk leaves."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import prompt_tokens, tiny

from ppd_compose import PromptTokens
from ppd_compose.identity import Identity
from ppd_compose.storage import cache_folder


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
