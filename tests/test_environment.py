"""Where results say that they come from."""

import subprocess
from pathlib import Path

import pytest
from tiny import tiny

from ppd_compose import environment as environment_module
from ppd_compose.environment import environment
from ppd_compose.identity import Identity, device_name


def test_without_git_a_result_names_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment(tiny(), "a command")["commit"] is None


def test_the_commit_of_a_checkout_around_an_environment_is_not_ours(tmp_path, monkeypatch):
    installed = tmp_path / "site-packages" / "environment.py"
    installed.parent.mkdir()
    installed.write_text("")
    (tmp_path / "theirs.py").write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=they", "-c", "user.email=they@example.org"]
    for words in (["init", "-q"], ["add", "theirs.py"], ["commit", "-q", "-m", "theirs"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(environment_module, "__file__", str(installed))
    assert environment(tiny(), "a command")["commit"] is None
    subprocess.run([*git, "add", str(installed)], check=True)
    assert environment(tiny(), "a command")["commit"] is not None


def test_a_base_in_the_hubs_cache_is_called_by_its_repository(tmp_path):
    base = tiny()
    folder = tmp_path / "models--someone--a-model" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    base.config.name_or_path = str(folder)
    assert Identity.of(base).name == "someone/a-model"
    base.config.name_or_path = str(tmp_path / "models--someone--a-model")
    assert Identity.of(base).name == "models--someone--a-model"


def test_a_folder_is_called_as_it_is_wherever_one_stands(tmp_path, monkeypatch):
    base = tiny()
    mine = tmp_path / "mine"
    mine.mkdir()
    cached = tmp_path / "models--someone--a-model" / "snapshots" / ("0" * 40)
    cached.mkdir(parents=True)
    (tmp_path / "kept").symlink_to(cached)
    (tmp_path / "favourite").symlink_to(mine)
    (mine / "tokenizer").mkdir()
    names = {"": "", ".": "mine", "tokenizer/..": "mine", "../kept": "someone/a-model", "../favourite": "favourite"}
    monkeypatch.chdir(mine)
    for told, name in names.items():
        base.config.name_or_path = told
        assert Identity.of(base).name == name


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("processor\t: 0\nmodel name\t: Some CPU\n", "Some CPU"),
        ("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n", "0x41 0xd4f"),
    ],
)
def test_cpus_without_a_name_are_told_apart(told, name, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path, **_: told)
    assert device_name(tiny()).startswith(f"CPU: {name}, ")


def test_what_changes_a_measurement_from_outside_is_told_with_it(monkeypatch):
    name = "TORCH_CUDNN_SDPA_DEPRIORITIZED"
    monkeypatch.delenv(name, raising=False)
    assert name not in environment(tiny(), "measure")
    monkeypatch.setenv(name, "1")
    assert environment(tiny(), "measure")[name] == "1"
