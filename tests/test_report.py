"""The report: figures of the results, nothing from elsewhere, and a page that a browser shows."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from test_compose import tokenizer
from tiny import Oracle, prompt, tiny

from ppd_compose import compose
from ppd_compose.report import composition_gain, write_report
from ppd_compose.trace import traced

VOID = {"meta", "br", "wbr"}
CHROMIUM = shutil.which("chromium")


def trace():
    base = tiny()
    answer = base.generate(prompt(), max_new_tokens=30, do_sample=False)
    model = compose(base, Oracle(answer[0].tolist()), "lookup", budget=16)
    words = tokenizer()
    return answer, traced(model, words, prompt(), 20), model


def run(name, speedup, drafters, **more):
    told = {"speedup": speedup, "tokens_per_second": 10 * speedup, "tokens_per_forward": 1.5, "identical": 1}
    return {
        "name": name, **told, "speedup_by_round": [speedup - 0.1, speedup + 0.1], "expected_per_forward": 1.4,
        "rows_per_forward": 5.5, "host_ms_per_step": 2.0, "questions": 2,
        "acceptance": {drafter: {"1": 0.4, "2": 0.1} for drafter in drafters}, "by_category": {"qa": told},
        "reliability": [{"guesses": 40, "claimed": 0.25, "right": 0.2}] if drafters else [],
        "divergences": [{"question": 1, "gap": 0.125}], **more,
    }  # fmt: skip


@pytest.fixture
def result(tmp_path):
    told = {
        "schema": 1,
        "environment": {
            "model": "Tiny <b>", "dtype": "bfloat16", "device": "CPU: a machine", "threads": 2, "command": "bench & co",
            "commit": "abc", "date": "2026-11-23", "versions": {"torch": "2.13.0"},
        },
        "budgets": {
            "one": {"rows": [1, 8, 64], "contexts": [128, 640], "seconds": [[0.02, 0.03, 0.08], [0.03, 0.04, 0.1]]}
        },
        "base": {"tokens_per_second": 10.0, "questions": 2, "by_category": {"qa": {"tokens_per_second": 10.0}}},
        "runs": [
            run("one", 1.5, ["one"]), run("<script>two</script>", 1.25, ["two"]),
            run("one+two", 1.8, ["one", "two"]), run("prompt_lookup_num_tokens=3", 1.1, []),
        ],
        "traces": {"one+two": trace()[1] | {"tokens": [{"text": " <i>", "drafters": ["two"]}]}},
    }  # fmt: skip
    for node in told["traces"]["one+two"]["step"]["nodes"]:
        node["drafters"] = ["one"] if node["drafters"] else []
    path = tmp_path / "result.json"
    path.write_text(json.dumps(told))
    return path


class Checked(HTMLParser):
    """Every tag is closed in order, and nothing is asked for elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.tags = [], "", []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert not {name for name, _ in attributes} & {"src", "href", "onclick"}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_trace_tells_who_guessed_which_token(tmp_path):
    answer, told, model = trace()
    words = tokenizer()
    assert [token["text"] for token in told["tokens"]] == [words.decode([t]) for t in answer[0, 13:32].tolist()]
    assert any("oracle" in token["drafters"] for token in told["tokens"])
    step = told["step"]
    assert step["nodes"][0] | {"text": ""} == {
        "text": "",
        "parent": -1,
        "chance": 1.0,
        "drafters": [],
        "accepted": True,
    }
    assert all(node["parent"] < at for at, node in enumerate(step["nodes"]))
    assert not model.plugins.manager.has_plugin("trace")


def test_the_page_tells_the_figures_and_escapes_what_it_is_given(result, tmp_path):
    write_report([result, result], tmp_path / "report.html")
    page = Checked()
    text = (tmp_path / "report.html").read_text()
    page.feed(text)
    assert page.open == []
    assert "1.80x" in page.text
    assert "1.20x" in page.text  # gained by composing
    assert "1.70 to 1.90" in page.text
    assert "at most 0.125 apart" in re.sub(r"\s+", " ", page.text).replace("\n", " ")
    assert 'cx="76.0" cy="172.8" r="8.0"' in text  # claimed 0.25, right 0.2
    assert "<script>two</script>" in page.text
    assert "script" not in page.tags
    assert "http" not in text
    assert page.text.count("Speed-up by category") == 2


def test_gain_needs_a_composition_and_a_single_drafter():
    assert composition_gain([run("one", 1.5, ["one"])]) is None
    gain = composition_gain([run("one", 1.5, ["one"]), run("both", 1.2, ["one", "two"]), run("peer", 9.0, [])])
    assert gain["ratio"] == pytest.approx(0.8)


@pytest.mark.parametrize("content", ["{}", '{"schema": 9}', "[]", "no", '{"schema": 1}', '{"schema": 1, "runs": []}'])
def test_what_is_no_result_is_refused_and_nothing_is_written(tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(ValueError, match=r"other\.json"):
        write_report([tmp_path / "other.json"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_sideways_scrolling(result, tmp_path, width):
    write_report([result], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    probe = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script>"
    # A narrow window is a frame: Chromium's own windows have a least width.
    (tmp_path / "probe.html").write_text(page.replace("</body>", f"{probe}</body>"))
    frame = f'<iframe id=f src="probe.html" width={width} height=900></iframe><script>f.onload = () => ' \
            "document.body.append(f.contentDocument.title)</script>"  # fmt: skip
    (tmp_path / "frame.html").write_text(frame)
    words = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path}/user", "--virtual-time-budget=3000", "--dump-dom", f"file://{tmp_path}/frame.html",
    ]  # fmt: skip
    told = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout
    whole, window = re.search(r"(\d+) of (\d+)", told).groups()
    assert int(whole) <= int(window) <= width


def test_bench_results_make_a_page(tmp_path):
    from test_cli import invoke

    base = tiny(dtype=torch.float32, eos=60)
    base.generation_config.max_length = None
    base.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.jsonl").write_text('{"category": "qa", "prompt": "abcabcabc"}\n')
    invoke(
        "bench", "--base", tmp_path / "base", "--dtype", "float32", "--questions", tmp_path / "prompts.jsonl",
        "--max-new-tokens", 8, "--drafters", "lookup", "--drafters", "lookup+recycling", "--rows", 8, "--rounds", 2,
        "--json", tmp_path / "result.json",
    )  # fmt: skip
    told = invoke("report", tmp_path / "result.json", "--out", tmp_path / "page.html")
    assert told.stdout.strip() == str(tmp_path / "page.html")
    page = Checked()
    page.feed((tmp_path / "page.html").read_text())
    assert "lookup+recycling" in page.text
    assert "An answer, token by token" in page.text
