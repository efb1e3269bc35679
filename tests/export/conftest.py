"""Matrices here are too small to gain from a second thread."""

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Run a module's tests on one thread of torch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
