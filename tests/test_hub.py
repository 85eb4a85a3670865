"""Sharing over HTTP: the official clients of the Hub, PEFT and transformers against a Hub on this machine."""

import json
import os
import subprocess
import sys
import warnings
from contextlib import suppress
from dataclasses import replace

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, close_session, constants
from loopback import TOKEN
from peft import PeftModel, get_peft_model
from ppd_compose.integrations.eagle import EagleHead
from ppd_compose.integrations.lookup import PromptLookup
from ppd_compose.integrations.medusa import MedusaHeads
from ppd_compose.integrations.recycling import TokenRecycling
from safetensors.torch import load_file
from test_eagle import eagle
from test_medusa import random_heads
from tiny import prompt, prompt_tokens, tiny
from transformers import AutoModelForCausalLM

from ppd_compose import (
    Budget,
    PPDConfig,
    PromptTokens,
    compose,
    compose_from_pretrained,
    load_drafter,
)
from ppd_compose.hub import pull_folder, push_folder
from ppd_compose.identity import Identity


def adapter(seed=0, n=3, name="user/base"):
    made = prompt_tokens(n, 2, seed=seed)
    identity = Identity.of(tiny())
    identity = Identity(name, identity.hidden_size, identity.vocab_size, identity.fingerprint, identity.embedding)
    return PromptTokens(made.embeddings, made.accuracy.tolist(), identity, {"data": "nothing", "steps": 3})


def same(first, second):
    assert torch.equal(first.embeddings, second.embeddings)
    assert (first.accuracy == second.accuracy).all()
    assert (first.identity, first.training) == (second.identity, second.training)


def test_push_and_pull_is_bit_for_bit_by_every_client(hub, tmp_path):
    base = tiny(dtype=torch.float32)
    base.push_to_hub("user/base")
    tokens = adapter()
    assert tokens.push_to_hub("user/adapter").startswith(f"{hub.url}/user/adapter/commit/")
    same(PromptTokens.from_pretrained("user/adapter"), tokens)
    same(load_drafter("user/adapter"), tokens)
    same(PromptTokens.from_pretrained(pull_folder("user/adapter", tmp_path / "pulled")), tokens)
    rows = tokens.embeddings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of older clients
        peft = PeftModel.from_pretrained(tiny(dtype=torch.float32), "user/adapter")
        auto = AutoModelForCausalLM.from_pretrained("user/adapter")
        native = tiny(dtype=torch.float32)
        native.load_adapter("user/adapter")
    for model in (peft, auto, native):
        assert torch.equal(PromptTokens.from_pretrained(model).embeddings, rows)


@pytest.mark.parametrize("make", [lambda: MedusaHeads(random_heads(), base_name="user/base"), eagle])
def test_heads_are_pushed_and_load_again(hub, tmp_path, make):
    heads = make()
    heads.push_to_hub("user/heads")
    heads.save_pretrained(tmp_path / "here")
    load_drafter("user/heads").save_pretrained(tmp_path / "there")
    tensors = [load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("here", "there")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


def test_what_a_repository_holds_already_is_not_read_in_the_place_of_what_is_pushed(hub, tmp_path):
    adapter().push_to_hub("user/mixed")
    before = hub.repos["user/mixed"].files()
    with pytest.raises(ValueError, match=r"holds adapter_config\.json, which would be read"):
        eagle().push_to_hub("user/mixed")
    assert hub.repos["user/mixed"].files() == before
    MedusaHeads(random_heads(), base_name="user/base").push_to_hub("user/heads")
    with pytest.raises(ValueError, match=r"holds medusa_lm_head\.safetensors"):
        MedusaHeads(random_heads(), base_name="user/base").push_to_hub(
            "user/heads", layout="vllm", base=tiny(dtype=torch.float32)
        )


def test_heads_without_a_base_that_the_hub_knows_are_pushed(hub):
    EagleHead(replace(eagle().head, identity=None)).push_to_hub("user/unnamed")
    assert b"base_model" not in hub.repos["user/unnamed"].files()["README.md"]


def test_what_peft_pushes_is_read_here(hub):
    model = get_peft_model(tiny(dtype=torch.float32), PPDConfig(num_prompt_tokens=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.push_to_hub("user/from-peft")
    found = PromptTokens.from_pretrained("user/from-peft")
    assert torch.equal(found.embeddings, PromptTokens.from_pretrained(model).embeddings)


def test_revisions_tags_branches_and_pull_requests(hub):
    first, second, third = (adapter(seed) for seed in (1, 2, 3))
    first.push_to_hub("user/adapter")
    HfApi().create_tag("user/adapter", tag="v1")
    second.push_to_hub("user/adapter", commit_message="more training")
    third.push_to_hub("user/adapter", revision="experiment")
    assert "/discussions/" in third.push_to_hub("user/adapter", create_pr=True)
    same(PromptTokens.from_pretrained("user/adapter", revision="refs/pr/4"), third)
    same(PromptTokens.from_pretrained("user/adapter"), second)
    same(PromptTokens.from_pretrained("user/adapter", revision="v1"), first)
    same(PromptTokens.from_pretrained("user/adapter", revision="experiment"), third)
    same(load_drafter("user/adapter", revision="v1"), first)
    with pytest.raises(OSError, match="nowhere"):
        PromptTokens.from_pretrained("user/adapter", revision="nowhere")


def test_an_adapter_in_a_subfolder(hub, tmp_path):
    adapter(1).save_pretrained(tmp_path / "both" / "small")
    adapter(2, n=4).save_pretrained(tmp_path / "both" / "large")
    push_folder(tmp_path / "both", "user/both")
    same(PromptTokens.from_pretrained("user/both", subfolder="large"), adapter(2, n=4))
    same(PromptTokens.from_pretrained(tmp_path / "both", subfolder="small"), adapter(1))
    for path in ("../other", "/etc"):
        with pytest.raises(ValueError, match="leads out of"):
            PromptTokens.from_pretrained("user/both", subfolder=path)


def test_a_private_repository_shows_itself_to_its_user_alone(hub, monkeypatch):
    adapter().push_to_hub("user/secret", private=True)
    assert hub.repos["user/secret"].private
    monkeypatch.delenv("HF_TOKEN")
    for load in (PromptTokens.from_pretrained, load_drafter):
        with pytest.raises(OSError, match="user/secret"):
            load("user/secret")
    same(PromptTokens.from_pretrained("user/secret", token=TOKEN), adapter())
    with pytest.raises(OSError, match="401"):
        adapter().push_to_hub("user/other")
    assert "user/other" not in hub.repos


@pytest.mark.parametrize("status", [401, 403, 404, 409, 500])
@pytest.mark.parametrize("request_", ["/preupload/", "/commit/"])
def test_a_failing_push_leaves_the_last_good_revision(hub, tmp_path, request_, status):
    adapter(1).push_to_hub("user/adapter")
    before = dict(hub.repos["user/adapter"].files())
    adapter(2).save_pretrained(tmp_path / "local")
    local = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    with hub.failing(request_, status), pytest.raises(OSError, match=str(status)):
        push_folder(tmp_path / "local", "user/adapter")
    assert hub.repos["user/adapter"].files() == before
    assert {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()} == local
    push_folder(tmp_path / "local", "user/adapter")
    same(PromptTokens.from_pretrained("user/adapter"), adapter(2))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_download_that_is_cut_off_is_taken_up_again(hub, tmp_path, name):
    adapter().push_to_hub("user/adapter")
    hub.cut[name] = 100
    if int(huggingface_hub.__version__.split(".")[0]) < 2:
        with suppress(OSError):  # the earlier of these do not try again by themselves
            PromptTokens.from_pretrained("user/adapter")
    same(PromptTokens.from_pretrained("user/adapter"), adapter())
    assert not hub.cut


@pytest.mark.parametrize("status", [401, 404, 500])
def test_a_failing_pull_writes_nothing(hub, tmp_path, status):
    adapter().push_to_hub("user/adapter")
    with hub.failing("adapter_model.safetensors", status), pytest.raises(OSError, match="user/adapter"):
        pull_folder("user/adapter", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    assert pull_folder("user/adapter", tmp_path / "pulled") == tmp_path / "pulled"
    with pytest.raises(FileExistsError, match="is there already"):
        pull_folder("user/adapter", tmp_path / "pulled")
    same(PromptTokens.from_pretrained(tmp_path / "pulled"), adapter())


def test_what_was_fetched_serves_offline(hub, monkeypatch):
    adapter().push_to_hub("user/adapter")
    PromptTokens.from_pretrained("user/adapter")
    load_drafter("user/adapter")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    same(PromptTokens.from_pretrained("user/adapter"), adapter())
    same(load_drafter("user/adapter"), adapter())
    assert len(hub.asked) == asked
    with pytest.raises(OSError, match="user/never"):
        PromptTokens.from_pretrained("user/never")


def test_a_link_that_leads_out_is_not_uploaded(hub, tmp_path):
    adapter().save_pretrained(tmp_path / "local")
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "local" / "more.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(ValueError, match="leads out of"):
        push_folder(tmp_path / "local", "user/adapter")
    assert not hub.repos


def test_pickles_are_neither_pushed_nor_pulled(hub, tmp_path):
    adapter().save_pretrained(tmp_path / "local")
    (tmp_path / "local" / "adapter_model.bin").write_bytes(b"pickle")
    push_folder(tmp_path / "local", "user/adapter")
    names = {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert set(hub.repos["user/adapter"].files()) == names
    hub.repos["user/adapter"].files()["evil.bin"] = b"pickle"
    assert not (pull_folder("user/adapter", tmp_path / "pulled") / "evil.bin").exists()


def test_the_card_is_one_that_the_hub_takes(hub):
    result = {
        "environment": {"device": "a machine", "dtype": "bfloat16", "command": "ppd-compose bench"},
        "base": {"questions": 6, "by_category": {"qa": {}}},
        "runs": [{"name": "ppd", "speedup": 1.5, "by_category": {"qa": {"speedup": 1.25}}}],
    }
    adapter().push_to_hub("user/adapter", results=[result])
    card = ModelCard.load("user/adapter")
    assert card.data.base_model == "user/base"
    assert card.data.library_name == "ppd_compose"
    assert {"peft", "ppd_compose"} <= set(card.data.tags)
    assert "| qa | 1.25x |" in card.text
    assert "- data: nothing" in card.text
    assert "import ppd_compose" in card.text


@pytest.mark.parametrize("budget", [12, Budget((1, 16), (0,), ((1.0, 2.0),)), None])
def test_a_composition_is_saved_with_all_that_it_needs(hub, tmp_path, budget):
    base = tiny(dtype=torch.float32)
    base.push_to_hub("user/base")
    heads = MedusaHeads(random_heads(), choices=[[0], [1], [0, 0]], identity=Identity.of(base))
    model = compose(base, adapter(), heads, PromptLookup(size=7), budget=budget or 12)
    expected = model.generate(prompt(), max_new_tokens=12, do_sample=False)
    if budget is None:
        model.budget, model.watch = None, object()  # as if it were to be measured
    model.save_composition(tmp_path / "saved")
    push_folder(tmp_path / "saved", "user/composed")
    for source in (tmp_path / "saved", "user/composed"):
        again = compose_from_pretrained(source, base, **({} if budget else {"budget": 12}))
        assert list(again.plugins.drafters) == ["ppd", "medusa", "lookup"]
        ppd, medusa, lookup = again.plugins.drafters.values()
        same(ppd, adapter())
        assert medusa.settings == {"choices": [[0], [1], [0, 0]]}
        assert lookup.size == 7
        assert budget is None or again.budget.curve(1).tolist() == model.budget.curve(1).tolist()
        mine, theirs = (each.plugins.manager.get_plugin("evidence").learnt() for each in (again, model))
        assert mine == theirs
        assert torch.equal(again.generate(prompt(), max_new_tokens=12, do_sample=False), expected)


def test_a_composition_finds_its_base_by_name(hub, tmp_path):
    base = tiny(dtype=torch.float32)
    base.push_to_hub("user/base")
    base = AutoModelForCausalLM.from_pretrained("user/base")
    compose(base, "lookup", budget=8).save_composition(tmp_path / "saved")
    model = compose_from_pretrained(tmp_path / "saved")
    expected = base.generate(prompt(), max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(prompt(), max_new_tokens=12, do_sample=False), expected)


def test_a_base_whose_name_has_come_to_be_anothers_is_told(hub, tmp_path):
    tiny(dtype=torch.float32).push_to_hub("user/base")
    base = AutoModelForCausalLM.from_pretrained("user/base")
    compose(base, "lookup", budget=8).save_composition(tmp_path / "saved")
    tiny(dtype=torch.float32, seed=1).push_to_hub("user/base")
    with pytest.warns(UserWarning, match=r"user/base.*other weights than the base that this composition learnt from"):
        compose_from_pretrained(tmp_path / "saved")
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    compose(base, "lookup", budget=8).save_composition(tmp_path / "local")
    with pytest.raises(OSError, match=r"the base of .*local, base \(hidden 32.*cannot be loaded by its name: give it"):
        compose_from_pretrained(tmp_path / "local")


def part(name, kind, folder=None, **settings):
    return {"name": name, "kind": kind, "settings": settings, "folder": folder}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"format_version": 2}, ValueError, "has format 2"),
        ({"drafters": [part("x", "unheard-of")]}, ValueError, "'unheard-of', which is no installed kind"),
        ({"drafters": [part("x", "ppd", folder="../../x")]}, FileNotFoundError, "no folder beside it"),
        ({"drafters": [part("x", "ppd", folder="..")]}, FileNotFoundError, "no folder beside it"),
        ({"drafters": [part("x", "ppd", folder="")]}, FileNotFoundError, "no folder beside it"),
        ({"drafters": [part("x", "lookup", size=0)]}, ValueError, "at least 1"),
        ({"drafters": [part("x", "lookup", odd=0)]}, ValueError, "settings that lookup does not take"),
        ({"drafters": [part("x", "recycling", width=10**12)]}, ValueError, "from 1 to 256"),
        ({"drafters": [{}]}, ValueError, "lacks a field"),
        ({"drafters": 3}, ValueError, "lacks a field"),
        ({"budget": {"rows": [1], "contexts": [0], "seconds": [[-1]]}}, ValueError, "positive"),
        ({"budget": {"rows": [1, 10**10], "contexts": [0], "seconds": [[1, 2]]}}, ValueError, "whole numbers up to"),
        ({"budget": {"rows": [1], "contexts": [0], "seconds": [[10**400]]}}, ValueError, "OverflowError"),
        ({"budget": {}}, ValueError, "lacks a field"),
        ({"base": 3}, ValueError, "lacks a field"),
        ({"base": {"name": 5, "hidden_size": 32, "vocab_size": 61, "fingerprint": "x"}}, ValueError, "must be a text"),
        ({"base": {"name": "o", "hidden_size": 9, "vocab_size": 61, "fingerprint": "x"}}, ValueError, "composed for o"),
        ({"calibration": {"drafters": ["other"]}}, ValueError, "was learnt with drafters"),
        ({"calibration": "/etc/hostname"}, ValueError, "lacks a field"),
        ({"calibration": None}, ValueError, "lacks a field"),
    ],
)
def test_a_composition_that_is_none_is_refused(tmp_path, change, error, message):
    compose(tiny(), "lookup", budget=8).save_composition(tmp_path / "saved")
    path = tmp_path / "saved" / "composition.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(error, match=message):
        compose_from_pretrained(tmp_path / "saved", tiny())


def test_settings_of_numpy_are_saved_as_numbers(tmp_path):
    base = tiny(dtype=torch.float32)
    drafters = PromptLookup(size=np.int64(8)), TokenRecycling(least=np.float32(0.25))
    compose(base, *drafters, budget=8).save_composition(tmp_path / "saved")
    again = compose_from_pretrained(tmp_path / "saved", base).plugins.drafters
    assert again["lookup"].size == 8
    assert again["recycling"].least == 0.25
    bad = PromptLookup()
    bad.settings = {"size": object()}
    with pytest.raises(TypeError, match="a drafter's settings hold <object"):
        compose(base, bad, budget=8).save_composition(tmp_path / "bad")


def test_a_drafter_of_no_installed_kind_cannot_be_saved(tmp_path):
    from tiny import Oracle

    with pytest.raises(ValueError, match="'oracle' is a Oracle, no kind that is installed"):
        compose(tiny(), Oracle([]), budget=8).save_composition(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_the_commands_push_and_pull_by_the_endpoint_of_the_environment(hub, tmp_path):
    """A process of its own, as `HF_ENDPOINT` is read when the client is imported."""
    adapter().save_pretrained(tmp_path / "local")
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
    }
    script = (
        "import sys; from ppd_compose.cli import app\n"
        "app(['push', sys.argv[1], 'user/adapter', '--private'], standalone_mode=False)\n"
        "app(['pull', 'user/adapter', sys.argv[2]], standalone_mode=False)\n"
    )
    words = [sys.executable, "-c", script, str(tmp_path / "local"), str(tmp_path / "pulled")]
    told = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    assert f"{hub.url}/user/adapter/commit/" in told.stdout
    assert hub.repos["user/adapter"].private
    same(PromptTokens.from_pretrained(tmp_path / "pulled"), adapter())


@pytest.mark.parametrize("whole", [False, True])
def test_generate_takes_a_repository_as_its_way_of_decoding(hub, tmp_path, monkeypatch, whole):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path, str(tmp_path / "modules")])
    monkeypatch.setenv("PPD_COMPOSE_HOME", str(tmp_path / "home"))
    base = tiny(dtype=torch.float32)
    if whole:
        compose(base, adapter(), "lookup", budget=8).save_composition(tmp_path / "saved")
        push_folder(tmp_path / "saved", "user/decoding", custom_generate=True)
    else:
        adapter().push_to_hub("user/decoding", custom_generate=True)
    expected = base.generate(prompt(), max_new_tokens=12, do_sample=False)
    settings = {"custom_generate": "user/decoding", "trust_remote_code": True}
    assert torch.equal(base.generate(prompt(), max_new_tokens=12, do_sample=False, **settings), expected)
    with pytest.raises(ValueError, match="trust_remote_code"):
        base.generate(prompt(), max_new_tokens=12, custom_generate="user/decoding", trust_remote_code=False)


def test_without_a_network_what_was_fetched_serves_and_the_rest_is_an_error_in_words(hub, tmp_path):
    adapter().push_to_hub("user/adapter")
    load_drafter("user/adapter")
    PromptTokens.from_pretrained("user/adapter")
    hub.server.shutdown()
    hub.server.server_close()
    close_session()
    same(load_drafter("user/adapter"), adapter())
    adapter().save_pretrained(tmp_path / "local")
    for call in (lambda: push_folder(tmp_path / "local", "user/new"), lambda: load_drafter("user/never")):
        with pytest.raises(OSError, match=r"user/(new|never).*check the name"):
            call()


def test_a_public_repository_is_not_taken_for_a_private_one(hub):
    adapter(1).push_to_hub("user/adapter")
    with pytest.raises(ValueError, match="is there already and public"):
        adapter(2).push_to_hub("user/adapter", private=True)
    same(PromptTokens.from_pretrained("user/adapter"), adapter(1))


def test_a_composition_that_cannot_be_saved_leaves_nothing(tmp_path):
    unknown = PromptTokens(torch.zeros(1, 1, 32))
    unknown.name = "unknown"
    model = compose(tiny(), adapter(), unknown, budget=8)
    with pytest.raises(ValueError, match="identity"):
        model.save_composition(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_drafters_whose_names_could_be_each_others_folders(tmp_path):
    base, (one, two) = tiny(), (adapter(1), adapter(2))
    two.name = "ppd-1"
    compose(base, one, budget=8).save_composition(tmp_path)
    compose(base, one, two, budget=8).save_composition(tmp_path)
    parts = json.loads((tmp_path / "composition.json").read_text())["drafters"]
    for part, drafter in zip(parts, (one, two), strict=True):
        same(PromptTokens.from_pretrained(tmp_path / part["folder"]), drafter)


def test_saving_a_composition_over_another_leaves_one_of_them(tmp_path, monkeypatch):
    base = tiny()
    compose(base, "lookup", budget=8).save_composition(tmp_path)
    monkeypatch.setattr("ppd_compose.saved.write_text", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        compose(base, adapter(), "lookup", budget=8).save_composition(tmp_path)
    assert list(compose_from_pretrained(tmp_path, base).plugins.drafters) == ["lookup"]
    monkeypatch.undo()
    for seed in (1, 2):
        compose(base, adapter(seed), "lookup", budget=8).save_composition(tmp_path)
        ppd, _ = compose_from_pretrained(tmp_path, base).plugins.drafters.values()
        same(ppd, adapter(seed))
    assert sum(path.is_dir() for path in tmp_path.iterdir()) == 1


def test_a_repository_with_nothing_that_is_shared_is_told(hub, tmp_path):
    adapter().push_to_hub("user/adapter")
    hub.repos["user/adapter"].commit({"adapter_model.bin": b"a pickle"}, "main")
    with pytest.raises(ValueError, match=r"user/adapter holds nothing to fetch: .*pickles are left there"):
        pull_folder("user/adapter", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
