"""The README: its code runs, its tree is the disk's; its tables and those of RESULTS.md are those of the results."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from ppd_compose.integrations.ngram import NGramTable
from tables import NAMES, between, render
from test_compose import tokenizer
from test_ngram import ngram_table
from tiny import prompt_tokens, tiny

from ppd_compose import PromptTokens, load_drafter, shipped
from ppd_compose.identity import Identity

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_all_code_runs_in_order(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    base = tiny(dtype=torch.float32)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: base)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: tokenizer())
    made = prompt_tokens()
    tokens = PromptTokens(made.embeddings, made.accuracy.tolist(), Identity.of(base))
    monkeypatch.setattr(PromptTokens, "from_pretrained", lambda *a, **k: tokens)
    monkeypatch.setattr(NGramTable, "from_pretrained", lambda *a, **k: ngram_table())
    names = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert len(BLOCKS) >= 2
    # What the README says that the faulty drafter gets is what it gets.
    shown = re.search(r"^    (drafter 'late'.*), \.\.\.$", README, re.MULTILINE)
    assert shown.group(1) in capsys.readouterr().out
    ids = torch.randint(2, 50, (1, 9))
    expected = base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    told = names["model"].generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert torch.equal(told, expected)


def test_the_two_commands_are_there():
    assert 'pip install -e ".[demo]" && ppd-compose demo' in README
    assert 'pip install -e ".[test]" && pytest' in README


def test_the_file_tree_is_that_of_the_disk():
    listed = set(re.findall(r"^[ │├└─]*([\w.]+\.(?:py|jsonl|toml|md)|\.ci/run)\b", README, re.MULTILINE))
    for folder in ("ppd_compose", "benchmarks"):
        for path in (ROOT / folder).glob("*.py"):
            assert path.name in listed or path.name in ("__init__.py", "__main__.py"), path


@pytest.mark.parametrize(("file", "name"), [(file, name) for file, names in NAMES.items() for name in names])
def test_tables_are_made_from_the_results(file, name):
    begin, end = between(name)
    table = file.read_text().split(begin)[1].split(end)[0]
    assert table.strip() == render(name).strip()


def test_the_shipped_adapter_is_small_and_loads():
    tokens = PromptTokens.from_pretrained(shipped.shipped_drafter("ppd"))
    assert sum(path.stat().st_size for path in shipped.shipped_drafter("ppd").iterdir()) <= 30_000
    assert tokens.embeddings.numel() <= 1e-4 * 134_515_008
    assert "ppd-compose train ppd" in (shipped.shipped_drafter("ppd") / "README.md").read_text()


@pytest.mark.parametrize(("name", "limit"), [("medusa", 6_000_000), ("eagle", 12_000_000), ("ngram", 2_000_000)])
def test_the_shipped_heads_are_small_and_load(name, limit):
    folder = shipped.shipped_drafter(name)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= limit
    assert load_drafter(name).name == name
    assert f"ppd-compose train {name}" in (folder / "README.md").read_text()
