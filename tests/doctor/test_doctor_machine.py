"""This machine: packages, devices, shared memory, Slurm."""

from importlib import metadata
from pathlib import Path

import pytest
import torch
from findings import bad, by_name
from steptron.doctor import machine, slurm


def test_a_package_that_is_too_old_and_one_that_is_missing(monkeypatch):
    real = metadata.version

    def version(name: str) -> str:
        if name == "wandb":
            raise metadata.PackageNotFoundError(name)
        return "0.1" if name == "tokenizers" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    found = by_name(machine.python())
    assert (found["tokenizers"].state, found["tokenizers"].found) == ("failed", "0.1 is installed")
    assert found["tokenizers"].fix.startswith("pip install 'tokenizers>=")
    assert (found["wandb"].state, found["wandb"].found) == ("failed", "not installed")
    assert "tokenizers" not in found["packages"].found


def test_a_python_that_is_too_old(monkeypatch):
    monkeypatch.setattr(machine.sys, "version_info", (3, 9, 0))
    assert by_name(machine.python())["Python"].state == "failed"


def test_a_source_tree_that_is_not_installed(monkeypatch):
    def requires(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert bad(machine.python()) == {"packages": "note"}


def test_optional_packages_say_what_they_add_and_how_to_get_them(monkeypatch):
    monkeypatch.setattr(machine, "find_spec", lambda module: None)
    findings = list(machine.optional_packages())
    assert {finding.state for finding in findings} == {"note"}
    assert all("it would add" in finding.found and finding.fix.startswith("pip install") for finding in findings)


def test_a_device_that_multiplies_wrongly(monkeypatch):
    class Properties:
        name, total_memory = "a GPU", 80 << 30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Properties)

    def ones(*shape: int, device: str) -> torch.Tensor:
        if device == "cuda:1":
            raise RuntimeError("an illegal memory access")
        return torch.full(shape, 1.0)

    monkeypatch.setattr(torch, "ones", ones)
    found = by_name(machine.devices())
    assert (found["CUDA 0"].state, found["CUDA 0"].found) == ("ok", "a GPU, 80 GiB")
    assert (found["CUDA 1"].state, found["CUDA 1"].found) == ("failed", "a GPU, 80 GiB: an illegal memory access")
    monkeypatch.setattr(torch, "ones", lambda *shape, device: torch.full(shape, 1.0 + (device == "cuda:0")))
    assert by_name(machine.devices())["CUDA 0"].found == "a GPU, 80 GiB: a matrix product is wrong"


def test_shared_memory_that_cannot_be_made_or_is_little(monkeypatch):
    monkeypatch.setattr(machine, "SHARED_BYTES", 1 << 80)
    assert by_name(machine.memory())["shared memory"].found.endswith("that is not much")

    def refuse(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(machine, "SharedMemory", refuse)
    found = by_name(machine.memory())["shared memory"]
    assert found.found == "cannot be allocated: [Errno 28] No space left on device"
    assert "--shm-size" in found.fix


def test_a_containers_limit_counts(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "Path", lambda path: limit)
    whole = machine.memory_bytes()
    limit.write_text(f"{1 << 30}\n")
    assert machine.memory_bytes() == 1 << 30
    limit.write_text("max\n")
    assert machine.memory_bytes() == whole


@pytest.fixture
def commands(tmp_path: Path, monkeypatch):
    """Slurm's commands on the PATH; `sinfo` is a script of the test's."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def write(sinfo: str) -> None:
        for name in slurm.COMMANDS:
            (tmp_path / name).write_text(f"#!/bin/sh\n{sinfo if name == 'sinfo' else ''}\n")
            (tmp_path / name).chmod(0o755)

    return write


def test_slurm_answers(commands):
    commands('[ "$1" = --version ] && echo "slurm-wlm 22.05.8" || echo "cpu*: 4 idle"')
    [found] = slurm.slurm()
    assert (found.state, found.found) == ("ok", "slurm-wlm 22.05.8; cpu*: 4 idle")


@pytest.mark.parametrize(
    ("sinfo", "said"),
    [("echo first >&2; echo no controller >&2; exit 1", "no controller"), ("sleep 60", "timed out")],
    ids=["refuses", "is silent"],
)
def test_slurm_does_not_answer(commands, monkeypatch, sinfo, said):
    monkeypatch.setattr(slurm, "ANSWER_S", 0.3)
    commands(sinfo)
    [found] = slurm.slurm()
    assert found.state == "note"
    assert said in found.found
    assert "SLURM_CONF" in found.fix


def test_no_slurm(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    [found] = slurm.slurm()
    assert (found.state, found.found) == ("note", "no sbatch, srun, scontrol, sinfo")
