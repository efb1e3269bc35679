"""Checks of this machine: interpreter, packages, devices, memory."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

from steptron.doctor.finding import Finding, one_line

GIB = 2**30
SHARED_BYTES = 64 << 20
"""The amount of shared memory that NCCL and the processes of the metrics server need, roughly."""

OPTIONAL = {
    "deepspeed": ("deepspeed", "DeepSpeed's ZeRO as the engine", "pip install 'steptron[deepspeed]'"),
    "transformer-engine": (
        "transformer_engine",
        "kernels.experts=transformer_engine, on NVIDIA GPUs",
        "pip install 'steptron[transformer-engine]'",
    ),
    "triton": ("triton", "kernels.experts and kernels.elementwise, the fastest on Hopper", "pip install triton"),
    "wandb-workspaces": (
        "wandb_workspaces",
        "`steptron monitor workspace`, W&B's panels",
        "pip install 'steptron[workspace]'",
    ),
    "datasketch": (
        "datasketch",
        "`steptron data build --drop-duplicates near`",
        "pip install 'steptron[dedup]'",
    ),
    "s3fs": ("s3fs", "inputs of `data build`, checkpoints and metrics on S3 (s3://…)", "pip install s3fs"),
    "transformers": ("transformers", "an independent reader of exports, in the tests", "pip install 'steptron[dev]'"),
}
"""The optional packages: distribution → module, benefit, installation command."""


def python() -> Iterator[Finding]:
    """Check the interpreter, and the versions of the packages that pyproject.toml requires."""
    from packaging.requirements import Requirement

    supported = sys.version_info >= (3, 11)
    found = f"{platform.python_version()}, {sys.executable}"
    yield Finding("Python", "ok" if supported else "failed", found, "" if supported else "install Python 3.11 or later")
    try:
        requirements = [Requirement(text) for text in metadata.requires("steptron") or []]
    except metadata.PackageNotFoundError:
        found = "steptron runs from its source tree, so required versions are not checked"
        yield Finding("packages", "note", found, "pip install --editable .")
        return
    present = []
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = version_of(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found = f"{version} is installed" if version else "not installed"
            wanted = f"{requirement.name}{requirement.specifier}"
            yield Finding(requirement.name, "failed", found, f"pip install '{wanted}'")
        else:
            present.append(f"{requirement.name} {version}")
    yield Finding("packages", "ok", ", ".join(present))


def devices() -> Iterator[Finding]:
    """Check CPU threads and CUDA devices. Each CUDA device multiplies a matrix."""
    import torch

    threads = f"{cores()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    yield Finding("CPU", "ok", threads)
    if not torch.cuda.is_available():
        driver = Path("/proc/driver/nvidia/version").exists()
        if driver and torch.version.cuda is None:
            found = f"torch {torch.__version__} is a CPU build, but this machine has an NVIDIA driver"
            fix = "install a CUDA build of torch"
        elif driver:
            found, fix = (
                "there is an NVIDIA driver, but torch finds no device",
                "check nvidia-smi and CUDA_VISIBLE_DEVICES",
            )
        else:
            found, fix = "no device", "none needed: runs use the CPU (run.device=auto)"
        yield Finding("CUDA", "note", found, fix)
        return
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        try:
            ones = torch.ones(64, 64, device=f"cuda:{i}")
            trouble = "" if bool((ones @ ones == 64).all()) else ": a matrix product is wrong"
        except RuntimeError as error:
            trouble = f": {one_line(error)}"
        found = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB{trouble}"
        fix = "exclude it with CUDA_VISIBLE_DEVICES, or reset it" if trouble else ""
        yield Finding(f"CUDA {i}", "failed" if trouble else "ok", found, fix)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Return the memory in bytes that this process may use: the machine's, or less if a container has a limit."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    capped = limit.read_text().strip() if limit.is_file() else "max"
    return total if capped == "max" else min(total, int(capped))


def memory() -> Iterator[Finding]:
    """Check memory, and shared memory by allocating some."""
    total, free = memory_bytes() / GIB, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    yield Finding("memory", "ok", f"{total:.1f} GiB for this process, {free:.1f} GiB free on the machine")
    fix = "give more to /dev/shm (docker run --shm-size=1g): NCCL and `steptron monitor serve` need it"
    try:
        piece = SharedMemory(create=True, size=1 << 20)
        assert piece.buf is not None, "it has just been made"
        piece.buf[:4] = b"here"
        piece.close()
        piece.unlink()
    except OSError as error:
        yield Finding("shared memory", "note", f"cannot be allocated: {one_line(error)}", fix)
        return
    folder = Path("/dev/shm")
    if not folder.is_dir():
        yield Finding("shared memory", "ok", "works")
        return
    free_bytes = shutil.disk_usage(folder).free
    found = f"{free_bytes / GIB:.2f} GiB free at {folder}"
    if free_bytes < SHARED_BYTES:
        yield Finding("shared memory", "note", f"{found}; that is not much", fix)
    else:
        yield Finding("shared memory", "ok", found)


def optional_packages() -> Iterator[Finding]:
    """Check the packages that are not required, and say what each would add."""
    for name, (module, adds, install) in OPTIONAL.items():
        if find_spec(module) is None:
            yield Finding(name, "note", f"not installed; it would add {adds}", install)
        else:
            yield Finding(name, "ok", f"{version_of(name) or 'installed'}: {adds}")


def version_of(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
