"""The device of a rank, and the memory that its process keeps between steps."""

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.utils.deterministic

from steptron.config.schema import RunConfig
from steptron.errors import RecipeError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""The numbers of these options in glibc's malloc.h."""


def pick_device(run: RunConfig) -> torch.device:
    """Return the device of this rank. Raises `RecipeError` if the requested device does not exist here."""
    wanted = run.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RecipeError("run.device=cuda but torch finds no CUDA device here; set run.device=cpu or auto")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


@contextmanager
def one_order(device: torch.device, deterministic: bool) -> Iterator[None]:
    """Make torch's operations on a CUDA device add in one order inside of the block, if `deterministic`.

    The flash attention of torch (FA2), FA3 and FA4 read the same switch in their backward passes. cuBLAS reads its
    variable when it first multiplies. Memory that operations leave unwritten is not filled: nothing here reads it, and
    it would cost a pass over every new tensor.
    """
    if not deterministic or device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    memory: Any = torch.utils.deterministic  # torch's stubs do not know its one attribute
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        memory.fill_uninitialized_memory = filled


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held since `reset_peak_memory`: of CUDA tensors on a CUDA device,
    else of its whole memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _host_peak()


def _host_peak() -> int:
    """Return the largest resident size of this process in bytes.

    On Linux, getrusage would begin with the peak of the process that started this one. It is the way out where the
    kernel does not tell VmHWM.
    """
    with suppress(OSError):
        status = Path("/proc/self/status").read_text().splitlines()
        found = [int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:")]
        if found:
            return found[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, other systems KiB


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new peak at what is held now. Where the kernel is not Linux, the peak of host memory stays the process's.

    Linux takes the code 5 for "reset the peak of resident memory" (proc(5), clear_refs).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def keep_heap() -> None:
    """Make glibc keep freed memory for the next step.

    By default glibc returns every large tensor to the kernel, which then clears the pages again. That takes a tenth to
    a third of a step on a CPU. Other C libraries have no such option, and CUDA tensors have their own allocator.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
