"""The peak of a process's memory, and how the peaks of ranks are shown."""

import mmap
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from steptron.train import device
from steptron.train.device import peak_memory, reset_peak_memory
from steptron.train.loop import _of_ranks

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets the peak of a process")
def test_a_new_peak_forgets_what_was_given_back():
    before = peak_memory(CPU)
    with mmap.mmap(-1, before) as held:  # more than the process has ever held, and given back to the kernel at once
        held.write(bytes(before))
    high = peak_memory(CPU)
    assert high > before + before // 2
    reset_peak_memory(CPU)
    assert peak_memory(CPU) < high - before // 2
    reset_peak_memory(CPU)
    with mmap.mmap(-1, 64 * MIB) as held:
        held.write(bytes(64 * MIB))
    assert peak_memory(CPU) < high - before // 4


@pytest.mark.skipif(sys.platform != "linux", reason="only there does getrusage begin with the parent's peak")
def test_a_peak_is_not_that_of_the_process_that_started_this_one():
    code = "import torch; from steptron.train.device import peak_memory; print(peak_memory(torch.device('cpu')))"
    with mmap.mmap(-1, 1024 * MIB) as held:
        held.write(bytes(1024 * MIB))
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 50 * MIB < int(child.stdout) < 900 * MIB


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_without_a_peak_in_proc_it_is_that_of_getrusage(monkeypatch: pytest.MonkeyPatch, platform: str, unit: int):
    """Some kernels have no VmHWM, macOS has no /proc, and the unit depends on the system."""
    monkeypatch.setattr(device.Path, "read_text", lambda path: "VmRSS:\t 5 kB\n")
    monkeypatch.setattr(device.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=700))
    monkeypatch.setattr(device.sys, "platform", platform)
    assert peak_memory(CPU) == 700 * unit


@pytest.mark.parametrize(
    ("gib", "shown"),
    [
        ([1.24], "1.2 GiB"),
        ([1.24, 3.5], "1.2, 3.5 GiB (ranks 0 to 1)"),
        ([5.0, 4.0, *[6.0] * 7, 9.0], "4.0 GiB (rank 1) to 9.0 GiB (rank 9)"),
    ],
)
def test_few_ranks_are_shown_one_by_one(gib: list[float], shown: str):
    assert _of_ranks(gib) == shown
