"""The structure of the code: who imports whom, docstrings, sizes."""

import ast
from pathlib import Path

import pytest

import ppd_compose

ROOT = Path(__file__).parents[1]
CODE = sorted(path for part in ("ppd_compose", "integrations", "benchmarks") for path in (ROOT / part).rglob("*.py"))
# Each module may import only those before it.
ORDER = [
    "storage", "best_first", "hookspecs", "lineage", "tree", "device", "step", "check", "identity", "mask", "paging",
    "kernels", "changes", "packed", "written", "inplace", "recorders", "replayed", "fixed", "cache", "modes", "prefix",
    "regions", "built", "kept", "compiled", "grouped", "reached", "recorded", "forward", "underway", "verify", "budget",
    "logit", "forest", "evidence", "worth", "asking", "rows", "alternatives", "accept", "stopping", "plugins",
    "shipped", "sources", "tensor_files", "paired", "drafters", "stats", "measured", "drafting", "growing", "decode",
    "ahead", "refuse", "positions", "saved", "followed", "generation", "compose", "reopened", "testing", "reference",
    "adapter", "peft_method", "card", "hub", "top", "finish", "ensemble", "accuracy", "prompt", "offline", "prompts",
    "replies", "checkpoints", "training_loop", "states", "distill", "train", "training_setup", "train_job",
    "environment", "demo_base", "loading", "options", "hub_commands", "questions", "bench", "journal", "trace",
    "bench_job", "report", "profile", "streamed", "demo", "train_command", "cli", "__main__",
]  # fmt: skip


def own_imports(path):
    tree = ast.parse(path.read_text())
    typing_only = {
        node for block in ast.walk(tree) if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and node not in typing_only:
            yield from [node.module] if node.module else [alias.name for alias in node.names]


def test_imports_go_one_way():
    modules = {path.stem: path for path in (ROOT / "ppd_compose").glob("*.py") if path.stem != "__init__"}
    assert sorted(modules) == sorted(ORDER)
    for name, path in modules.items():
        for imported in own_imports(path):
            assert ORDER.index(imported) < ORDER.index(name), f"{name} imports {imported}"


def test_the_core_never_names_an_integration():
    for path in (ROOT / "ppd_compose").glob("*.py"):
        assert "integrations" not in path.read_text(), path


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_files_and_functions_are_short_and_documented(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "no module docstring"
    assert text.count("\n") <= 250
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is over 60 lines"


def test_everything_public_is_documented():
    for name in ppd_compose.__all__:
        public = getattr(ppd_compose, name)
        assert public.__doc__, name
        for member, value in vars(public).items() if isinstance(public, type) else ():
            if callable(value) and not member.startswith("_"):
                assert value.__doc__, f"{name}.{member}"
