"""One cluster for all tests with Slurm."""

import os
from collections.abc import Iterator

import pytest

from packages import need
from slurm_cluster import Slurm


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if os.geteuid() != 0:
        pytest.skip("needs root, to start Slurm's daemons")
    need(("slurmctld", "slurmd", "munged"), ("slurm-wlm", "munge"))
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
