"""Who may read what is saved."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ppd_compose.storage import cache_folder


@pytest.mark.skipif(os.name == "nt", reason="no such modes")
@pytest.mark.parametrize(("mask", "mode"), [(0o027, 0o640), (0o022, 0o644), (0o077, 0o600)])
def test_what_is_saved_is_as_open_as_its_user_makes_files(tmp_path, mask, mode):
    """In a process of its own, as the mask is one for all threads."""
    script = (
        f"import os, sys; os.umask({mask}); sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from tiny import prompt_tokens, tiny\n"
        "from ppd_compose.identity import Identity\n"
        f"tokens = prompt_tokens(); tokens.identity = Identity.of(tiny()); tokens.save_pretrained({str(tmp_path)!r})"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("PPD_COMPOSE_HOME", "~/mine")
    assert cache_folder() == Path.home() / "mine"
    monkeypatch.setenv("PPD_COMPOSE_HOME", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == Path.home() / ".cache" / "ppd_compose"
