"""Who may read what is saved."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

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
