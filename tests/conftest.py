"""One thread and a cache of its own for every test run."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _quiet(tmp_path_factory):
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    patch.setenv("PPD_COMPOSE_HOME", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("HF_HUB_OFFLINE", "1")
    yield
    patch.undo()
