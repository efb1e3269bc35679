"""`steptron doctor [RECIPE]`: what this machine can run, and what is missing for the rest, as a table.

machine, packages, devices, processes, cluster, recipe ──▶ [Finding] ──▶ rich table, exit code 2 if something required is missing
"""

import argparse
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

OPTIONAL = {
    "transformers": ("transformers", "an independent reader, for the export tests"),
    "deepspeed": ("deepspeed", "DeepSpeed's ZeRO as a backend"),
    "transformer-engine": ("transformer_engine", "fp8 on NVIDIA GPUs"),
    "apex": ("apex", "NVIDIA's fused kernels (built from source; PyPI's apex is another package)"),
    "llama-cpp-python": ("llama_cpp", "an independent reader of GGUF files"),
}
"""Distribution → (module, what it adds)."""

GIB = 2**30


class Finding(NamedTuple):
    """One row of the table."""

    name: str
    state: Literal["ok", "note", "missing"]
    """`note`: not needed here, or worth knowing; `missing`: required."""
    detail: str


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "doctor",
        help="check this machine",
        description="What this machine can run, and what is missing for the rest.",
        epilog="example: steptron doctor demo",
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="also check that this recipe's data is there")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="overrides of the recipe")


def run(args: argparse.Namespace) -> int:
    """Print the table. Returns 0, or 2 where something required is missing."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    findings = [*python()]
    if find_spec("torch") is not None:
        findings += [*devices(), *processes()]
    findings += [*memory(), *optional_packages(), *cluster()]
    if args.recipe:
        findings += recipe_data(args.recipe, args.overrides, args.recipes)
    table = Table("", "state", "what was found", title="steptron doctor", box=box.SIMPLE_HEAD)
    colours = {"ok": "green", "note": "yellow", "missing": "bold red"}
    for finding in findings:
        table.add_row(finding.name, f"[{colours[finding.state]}]{finding.state}[/]", finding.detail)
    missing = [finding.name for finding in findings if finding.state == "missing"]
    console = Console()
    console.print(table)
    console.print(f"missing: {', '.join(missing)}" if missing else "all that is required is there")
    return 2 if missing else 0


def python() -> Iterator[Finding]:
    """The interpreter and the packages that pyproject.toml requires, with versions."""
    from packaging.requirements import Requirement

    supported = sys.version_info >= (3, 11)
    yield Finding("Python", "ok" if supported else "missing", f"{platform.python_version()}, {sys.executable}")
    try:
        requirements = [Requirement(text) for text in metadata.requires("steptron") or []]
    except metadata.PackageNotFoundError:
        yield Finding("steptron", "note", "not installed, run from its source: required versions are not checked")
        return
    present = []
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found = f"{version} is installed" if version else "not installed"
            yield Finding(requirement.name, "missing", f"{found}; needs {requirement.name}{requirement.specifier}")
        else:
            present.append(f"{requirement.name} {version}")
    yield Finding("packages", "ok", ", ".join(present))


def devices() -> Iterator[Finding]:
    """CPU threads and CUDA devices."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(
        "CPU", "ok", f"{cores} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    if not torch.cuda.is_available():
        yield Finding("CUDA", "note", "no device; runs go to the CPU")
        return
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        yield Finding(f"CUDA {i}", "ok", f"{properties.name}, {properties.total_memory / GIB:.0f} GiB")


def processes() -> Iterator[Finding]:
    """Collectives: gloo by doing one, NCCL by asking torch."""
    import torch
    import torch.cuda.nccl
    import torch.distributed as dist

    try:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        total = torch.ones(1)
        dist.all_reduce(total)
        yield Finding("gloo", "ok", "an all_reduce of one process works")
    except Exception as error:  # whatever it is, it is what the doctor was asked to find
        yield Finding("gloo", "missing", " ".join(str(error).split()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if dist.is_nccl_available():
        yield Finding("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Finding("NCCL", "note", "not in this build of torch; needed for GPUs only")


def memory() -> Iterator[Finding]:
    """Memory, shared memory and disk."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = (os.sysconf(key) * page / GIB for key in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    limit = Path("/sys/fs/cgroup/memory.max")
    capped = limit.read_text().strip() if limit.is_file() else "max"
    cap = "" if capped == "max" else f", {int(capped) / GIB:.1f} GiB allowed to this container"
    yield Finding("memory", "ok", f"{total:.1f} GiB, {free:.1f} GiB free{cap}")
    for name, folder, wanted in (("/dev/shm", Path("/dev/shm"), 0.0625), ("disk", Path.cwd(), 1.0)):
        if not folder.is_dir():
            yield Finding(name, "note", "not there")
            continue
        usage = shutil.disk_usage(folder)
        enough = usage.free / GIB >= wanted
        detail = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free at {folder}"
        yield Finding(name, "ok" if enough else "note", detail + ("" if enough else "; that is little"))


def optional_packages() -> Iterator[Finding]:
    """What is not required, with what it would add."""
    for name, (module, adds) in OPTIONAL.items():
        if find_spec(module) is None:
            yield Finding(name, "note", f"not installed; would add {adds}")
        else:
            yield Finding(name, "ok", f"{_version(name) or 'installed'}: {adds}")


def cluster() -> Iterator[Finding]:
    """Slurm's commands."""
    found = [command for command in ("sbatch", "srun", "scontrol") if shutil.which(command)]
    if len(found) == 3:
        yield Finding("Slurm", "ok", ", ".join(found))
    else:
        there = f"only {', '.join(found)}" if found else "no sbatch, srun, scontrol"
        yield Finding("Slurm", "note", f"{there}; needed for slurm/pretrain.sbatch only")


def recipe_data(name: str, overrides: list[str], recipes_dir: Path | None) -> Iterator[Finding]:
    """Whether the recipe resolves, and its tokenizer and sources are where it says. Raises `RecipeError`."""
    from steptron.config.resolve import resolve

    recipe = resolve(name, overrides, recipes_dir)
    yield Finding("recipe", "ok", f"{name}: {len(recipe.stages)} stages ({', '.join(recipe.stages)})")
    tokenizer = Path(recipe.data.tokenizer)
    yield _existing("data.tokenizer", tokenizer, tokenizer.is_file())
    for source, config in recipe.data.sources.items():
        yield _existing(f"data.sources.{source}", Path(config.path), (Path(config.path) / "source.json").is_file())


def _existing(key: str, path: Path, there: bool) -> Finding:
    return Finding(
        key,
        "ok" if there else "missing",
        f"{path}" + ("" if there else " is not there; build it with `steptron data build`"),
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
