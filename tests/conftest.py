"""One thread and a cache of its own for every test run, a Hub for those that share, and graphs without code."""

from contextlib import contextmanager

import huggingface_hub
import pytest
import torch
from huggingface_hub import close_session, constants
from loopback import TOKEN, Hub
from torch.utils._python_dispatch import TorchDispatchMode

from ppd_compose import compiled
from ppd_compose.kept import KeptGraph


@pytest.fixture(autouse=True, scope="session")
def _quiet(tmp_path_factory):
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    patch.setenv("PPD_COMPOSE_HOME", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("HF_HUB_OFFLINE", "1")
    yield
    patch.undo()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub, and clients in this process that know no other; its user is logged in."""
    close_session()
    with Hub() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        url = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", served.url)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # clients wait before they try again
        yield served
        close_session()


@pytest.fixture
def traced(monkeypatch):
    """The graphs made, which are traced and computed as they are, without code made for them, which takes most of the
    time: what they take for given is decided before that."""
    compile, graphs = torch.compile, []

    def computed(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def uncoded(run, *, options, **how):
        kept = {name: held for name, held in options.items() if name == "guard_filter_fn"}
        return compile(run, backend=computed, options=kept, **how)

    monkeypatch.setattr(torch, "compile", uncoded)
    monkeypatch.setattr(compiled, "_graphs", {})
    monkeypatch.setattr(compiled, "can_keep", lambda model: False)
    return graphs


@pytest.fixture
def nothing_compiled(monkeypatch):
    """A context within which whoever compiles fails."""

    def refuse(*_):
        raise AssertionError("compiled anew")

    @contextmanager
    def refusing():
        with monkeypatch.context() as patch, torch.compiler.set_stance("fail_on_recompile"):
            patch.setattr(KeptGraph, "_compiled", refuse)
            yield

    return refusing


class _NoDouble(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert (kwargs or {}).get("dtype") != torch.float64 or "_to_copy" not in str(func), "widened to float64"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_double():
    """Nothing within is widened to float64, which some devices, such as Apple's, do not have."""
    with _NoDouble():
        yield
