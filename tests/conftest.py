"""Shared by all tests: jaxtyped signatures of the maths are checked at every call; files that take long begin first."""

import os

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("WANDB_SILENT", "true")

install_import_hook(["steptron.nn", "steptron.moe", "steptron.optim"], "beartype.beartype")

LONGEST = (
    "test_distributed_layouts",  # eight ranks
    "test_train_deepspeed",
    "test_train_rewind",
    "test_train_chaos",
    "test_benchmarks_wire",
    "test_slurm_jobs",
    "test_launch_hosts",
    "test_train_run",
    "test_train_layouts",
    "test_train_engines",
    "test_train_stops",
    "test_prove_faults",
    "test_prove_command",
)
"""Files of half a minute to four minutes. Begun last, one would run alone while the other worker has nothing left to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put them in front."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
