"""slurm/pretrain.sbatch, with Slurm's commands played by stubs."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "pretrain.sbatch"

SRUN = """#!/bin/bash
# srun: a task a node, one after the other.
while [[ $1 == -* ]]; do
    if [[ $1 == --ntasks ]]; then tasks=$2; fi
    if [[ $1 == *=* ]]; then shift; else shift 2; fi
done
for ((node = 0; node < tasks; node++)); do SLURM_NODEID=$node "$@" || exit $?; done
"""
PYTHON = """#!/bin/sh
echo "node $SLURM_NODEID threads $OMP_NUM_THREADS: $*"
exit ${CODE:-0}
"""
SCONTROL = '#!/bin/sh\n[ "$*" = "show hostnames gpu[07-08]" ] && printf "gpu07\\ngpu08\\n"\n'

TWO_NODES = {
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_ON_NODE": "96",
}


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    for name, text in (("srun", SRUN), ("python", PYTHON), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def sbatch(*argv: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *argv],
        capture_output=True,
        text=True,
        env={"PATH": f"{path}:/usr/bin:/bin" if path else "/usr/bin:/bin", **environment},
        timeout=60,
    )


def test_syntax_and_directives() -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
    lines = SCRIPT.read_text().splitlines()
    assert lines[0].startswith("#!")
    directives = [n for n, line in enumerate(lines) if line.startswith("#SBATCH")]
    commands = [n for n, line in enumerate(lines) if line and not line.startswith("#")]
    assert max(directives) < min(commands), "Slurm stops reading directives at the first command"
    assert "#SBATCH --ntasks-per-node=1" in lines


def test_dry_run_prints_and_starts_nothing() -> None:
    done = sbatch("--dry-run", "demo", "run.name=a b")
    assert done.returncode == 0, done.stderr
    threads, command = done.stdout.splitlines()
    assert threads == f"export OMP_NUM_THREADS={len(os.sched_getaffinity(0))}"
    words = shlex.split(command)
    assert words[:8] == ["srun", "--nodes", "1", "--ntasks", "1", "--ntasks-per-node", "1", "--kill-on-bad-exit=1"]
    assert words[-5:] == ["-m", "steptron", "train", "demo", "run.name=a b"]


def test_what_is_printed_is_what_runs(commands: Path) -> None:
    printed = sbatch("--dry-run", "demo", "run.name=a b", path=commands, **TWO_NODES).stdout
    by_hand = subprocess.run(
        ["bash", "-c", printed], capture_output=True, text=True, env={"PATH": f"{commands}:/usr/bin:/bin"}
    )
    assert by_hand.stdout == sbatch("demo", "run.name=a b", path=commands, **TWO_NODES).stdout != ""


def test_one_torchrun_a_node(commands: Path) -> None:
    done = sbatch("demo", "seed=1", path=commands, **TWO_NODES)
    common = "--nnodes 2 --nproc-per-node 8 --master-addr gpu07 --master-port 24242 -m steptron train demo seed=1"
    assert done.stdout.splitlines() == [
        f"node {node} threads 12: -m steptron.cli.torchrun --node-rank {node} {common}" for node in (0, 1)
    ]


def test_resume_and_settings_from_outside(commands: Path) -> None:
    done = sbatch(
        "--resume",
        "runs/x",
        path=commands,
        RANKS_PER_NODE="2",
        MASTER_ADDR="10.0.0.1",
        MASTER_PORT="1234",
        OMP_NUM_THREADS="5",
    )
    assert done.stdout == (
        "node 0 threads 5: -m steptron.cli.torchrun --node-rank 0 --nnodes 1 --nproc-per-node 2 "
        "--master-addr 10.0.0.1 --master-port 1234 -m steptron resume runs/x\n"
    )


def test_the_exit_code_is_passed_on(commands: Path) -> None:
    assert sbatch("demo", path=commands, CODE="75").returncode == 75


@pytest.mark.parametrize("argv", [[], ["--dry-run"], ["--resume"]], ids=lambda argv: " ".join(argv) or "nothing")
def test_wrong_usage(argv: list[str]) -> None:
    done = sbatch(*argv)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
