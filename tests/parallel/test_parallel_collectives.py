"""The timeout of the recipe holds for every process group, not just for the first."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from steptron.config.schema import DenseMeshConfig, ParallelConfig
from steptron.parallel.collectives import limit_all_groups
from steptron.parallel.mesh import build_meshes, resolve_layout

from ranks import run_ranks
from waiting import wait_until


def seconds_until_a_lonely_sum_fails(rank: int, failed: Path) -> float:
    """Rank 1 stays away until rank 0's sum has failed, which names the timeout that it had."""
    meshes = build_meshes(resolve_layout(ParallelConfig(dense=DenseMeshConfig(tp=2)), 2), "cpu")
    limit_all_groups(2.0)
    start = time.perf_counter()
    if rank == 0:
        with pytest.raises(RuntimeError, match=r"(?i)timed out waiting 2000 ?ms"):
            dist.all_reduce(torch.zeros(1), group=meshes.dense["tp"].get_group())
        failed.touch()
    else:
        wait_until(failed.exists, "rank 0's error")
    return time.perf_counter() - start


def test_a_mesh_group_fails_after_the_timeout(tmp_path):
    assert run_ranks(2, seconds_until_a_lonely_sum_fails, tmp_path, tmp_path / "failed")[0] > 1.5
