"""Ports, interfaces, process groups; and what Slurm tells a rank."""

import os
import socket

import pytest
import torch.distributed as dist
from findings import bad, by_name
from steptron.doctor import network

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", *network.INTERFACES)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def taken():
    """A port that somebody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_sum_that_fails_and_one_that_is_wrong(monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("no route\nto host")

    with network.process_group():
        assert by_name(network.collectives())["gloo"].state == "ok"
        monkeypatch.setattr(dist, "all_reduce", lambda one: one.fill_(3))
        assert by_name(network.collectives())["gloo"].found == "a sum over 1 ranks: the result is 3"
        monkeypatch.setattr(dist, "all_reduce", broken)
        found = by_name(network.collectives())["gloo"]
    assert (found.state, found.found) == ("failed", "a sum over 1 ranks: no route to host")
    assert not dist.is_initialized()


def test_ports_that_are_free():
    findings = list(network.ports())
    assert [finding.name for finding in findings] == ["loopback", "own address", "port"]
    assert by_name(findings)["loopback"].state == "ok"


@pytest.mark.parametrize(("chosen", "state"), [(True, "failed"), (False, "note")])
def test_a_port_that_is_taken(monkeypatch, taken, chosen, state):
    if chosen:
        monkeypatch.setenv("MASTER_PORT", str(taken))
    monkeypatch.setattr(network, "DEFAULT_PORT", taken)
    found = by_name(network.ports())["port"]
    assert (found.state, found.found) == (state, f"{taken} is not available: [Errno 98] Address already in use")


def test_a_jobs_own_port_is_no_offence(monkeypatch, taken):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_PORT", str(taken))
    assert by_name(network.ports())["port"].state == "ok"


def test_a_host_whose_name_leads_nowhere(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    findings = list(network.ports())
    assert by_name(findings)["own address"].found.startswith("no-such-host.invalid cannot be reached from here: ")
    assert "/etc/hosts" in by_name(findings)["own address"].fix


def test_a_name_that_is_loopback_is_of_no_use_to_other_hosts(monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.0.1")
    assert by_name(network.ports())["own address"].state == "ok"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert by_name(network.ports())["own address"].state == "note"


def test_no_loopback(monkeypatch):
    def refuse(address: str) -> None:
        raise OSError(99, "Cannot assign requested address")

    monkeypatch.setattr(network, "talk", refuse)
    assert bad(network.ports()) == {"loopback": "failed", "own address": "note"}


def test_an_interface_that_is_not_here(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,ib7")
    found = by_name(network.ports())["interface"]
    assert (found.state, found.found) == ("failed", "GLOO_SOCKET_IFNAME names ib7, which does not exist here")
    assert "lo" in found.fix


def test_somebody_answers_or_not(taken):
    assert network.answers("127.0.0.1", taken) == ""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert "refused" in network.answers("127.0.0.1", free.getsockname()[1])


def test_a_rank_that_srun_started(monkeypatch, tmp_path):
    step = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "70012"}
    for name, value in (step | {"SLURM_STEP_NODELIST": "n[1-2]", "PATH": f"{tmp_path}:/usr/bin:/bin"}).items():
        monkeypatch.setenv(name, value)
    for name in LAUNCHER:  # so that they are taken away again
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    (tmp_path / "scontrol").write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n')
    (tmp_path / "scontrol").chmod(0o755)
    network.rank_from_slurm()
    told = {name: os.environ.get(name) for name in LAUNCHER[:3]}
    assert told == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("n1", "20012")


def test_torchruns_word_goes_before_slurms(monkeypatch):
    for name, value in {"RANK": "0", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    network.rank_from_slurm()
    assert "WORLD_SIZE" not in os.environ
