"""One run exported for all; matrices here are too small to gain from a second thread."""

import shutil
from pathlib import Path

import pytest
import torch
from hf_runs import random_model, stage, write_run
from steptron.export.hf import export_hf


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Run a module's tests on one thread of torch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model():
    return random_model(stage())


@pytest.fixture(scope="session")
def run(model, tmp_path_factory) -> Path:
    """A run folder with the checkpoints of steps 3 and 7."""
    return write_run(tmp_path_factory.mktemp("run") / "run", model, stage(), steps=(3, 7))


@pytest.fixture(scope="session")
def released(run, tmp_path_factory) -> Path:
    """The run exported in bf16."""
    out = tmp_path_factory.mktemp("released") / "out"
    export_hf(run, out)
    return out


@pytest.fixture
def damaged(released, tmp_path) -> Path:
    """A copy of the exported model that a test may spoil."""
    return Path(shutil.copytree(released, tmp_path / "damaged"))
