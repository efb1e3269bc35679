"""Hosts beside each other: four ranks that play three hosts, of which one has another clock, one other versions and no
shared folder."""

import ctypes
import json
import os
import socket
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from findings import by_name
from steptron.doctor import job
from steptron.doctor.finding import Finding

from ranks import start

AHEAD_S = 5.0
CLONE_NEWNS = 0x20000


def _rank(rank: int, port: int, folder: Path) -> None:
    host, local_rank = [("a", 0), ("a", 1), ("late", 0), ("odd", 0)][rank]
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": str(local_rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from steptron.doctor import job, network

    out = os.open(folder / f"{rank}.json", os.O_WRONLY | os.O_CREAT)  # before the folder is another one
    mine = [Finding("CPU", "note", "slow", "buy another")] if local_rank == 0 else []
    with network.process_group():
        socket.gethostname = lambda: host
        if host == "late":
            now = time.time
            job.time.time = lambda: now() + AHEAD_S
        if host == "odd":
            mine = [*mine, Finding("GPU", "failed", "gone", "have it put back"), Finding("disk", "ok", "large")]
            job._versions = lambda: "torch 1.0"
            job.APPEAR_S = 0.5
            assert ctypes.CDLL(None).unshare(CLONE_NEWNS) == 0, "a file system of its own needs root"
            subprocess.run(["mount", "--make-rprivate", "/"], check=True)
            subprocess.run(["mount", "-t", "tmpfs", "none", folder / "runs"], check=True)
        found = job.run_on_all_ranks(mine, folder / "runs")
    with os.fdopen(out, "w") as file:
        json.dump([asdict(finding) for finding in found], file)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[list[Finding]]:
    """What each rank was told."""
    if os.geteuid() != 0:
        pytest.skip("a host without the shared folder is made by mounting, which needs root")
    folder = tmp_path_factory.mktemp("job")
    (folder / "runs").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(_rank, rank, port, folder) for rank in range(4)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert list((folder / "runs").iterdir()) == []
    return [[Finding(**row) for row in json.loads((folder / f"{rank}.json").read_text())] for rank in range(4)]


def test_all_ranks_are_told_the_same(found):
    assert found[0] == found[1] == found[2] == found[3]


def test_of_other_hosts_what_is_bad_and_new_is_told(found):
    names = [finding.name for finding in found[0]]
    assert names == ["CPU", "odd (rank 3): GPU", "hosts", "versions", "clocks", "one folder"]
    assert by_name(found[0])["hosts"].found == "4 ranks on 3: a (rank 0), late (rank 2), odd (rank 3)"


def test_the_worst_clock_is_named(found):
    clocks = by_name(found[0])["clocks"]
    assert clocks.state == "note"
    host, _, rest = clocks.found.partition(" is ")
    ms, _, more = rest.partition(" ms ")
    assert (host, more) == ("late (rank 2)", "ahead, the most of 2")
    assert float(ms) == pytest.approx(1e3 * AHEAD_S, abs=100.0)
    assert "chrony" in clocks.fix


@pytest.mark.parametrize(
    ("offset", "state", "says"),
    [
        (-2.5, "note", "b is 2500.0 ms behind"),
        (2.5, "note", "b is 2500.0 ms ahead"),
        (-0.001, "ok", "b is 1.0 ms behind"),
    ],
    ids=["behind", "ahead", "little"],
)
def test_a_clock_may_be_wrong_either_way(monkeypatch, offset: float, state: str, says: str):
    monkeypatch.setattr(job, "offset_of", lambda rank: {1: 0.0, 2: offset}[rank])
    finding = job._clocks({0: "a", 1: "c", 2: "b"})
    assert (finding.state, finding.found) == (state, f"{says}, the most of 2")


def test_other_versions_are_named(found):
    versions = by_name(found[0])["versions"]
    assert versions.state == "failed"
    assert versions.found.endswith("; odd (rank 3) has torch 1.0")


def test_a_host_that_does_not_share_the_folder_is_named(found):
    folder = by_name(found[0])["one folder"]
    assert folder.state == "failed"
    assert "odd (rank 3) does not see within 0.5 s the file that rank 0 writes there" in folder.found
    assert "late" not in folder.found, "it shares folder and locks"
