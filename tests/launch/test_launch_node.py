"""launch/node.sh: what it runs, and what it says where a variable is missing."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "node.sh"
ENOUGH = {"NNODES": "2:4", "MASTER_ADDR": "node-a", "RANKS_PER_NODE": "8"}


def node(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *argv],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHON": "/usr/bin/echo", **environment},
    )


@pytest.mark.parametrize("script", ["node.sh", "env.sh"])
def test_syntax(script: str) -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT.parent / script)]).returncode == 0


def test_what_is_run() -> None:
    assert node("demo", "seed=1", **ENOUGH).stdout == (
        "-m steptron.launcher.torchrun --nnodes 2:4 --nproc-per-node 8 --max-restarts 3 --rdzv-backend c10d "
        "--rdzv-endpoint node-a:29400 --rdzv-id steptron -m steptron train --or-resume demo seed=1\n"
    )
    settings = {"IS_MASTER": "false", "RENDEZVOUS": "last_call_timeout=5", "NODE_ADDR": "10.0.0.2", "MASTER_PORT": "7"}
    assert node("--resume", "runs/x", MAX_RESTARTS="0", RUN_ID="night", **settings, **ENOUGH).stdout == (
        "-m steptron.launcher.torchrun --nnodes 2:4 --nproc-per-node 8 --max-restarts 0 --rdzv-backend c10d "
        "--rdzv-endpoint node-a:7 --rdzv-id night --rdzv-conf is_host=false,last_call_timeout=5 --local-addr 10.0.0.2 "
        "-m steptron resume runs/x\n"
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"NNODES": ""}, "NNODES: not set; "),
        ({"NNODES": "2-4"}, "NNODES=2-4: "),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR: not set; "),
        ({"RANKS_PER_NODE": ""}, "RANKS_PER_NODE: not set, and nvidia-smi lists no GPU; "),
        ({"RANKS_PER_NODE": "all"}, "RANKS_PER_NODE=all: "),
        ({"MAX_RESTARTS": "often"}, "MAX_RESTARTS=often: "),
        ({"IS_MASTER": "yes"}, "IS_MASTER=yes: "),
    ],
    ids=str,
)
def test_a_variable_that_is_missing_or_wrong(changed: dict[str, str], said: str) -> None:
    done = node("demo", **ENOUGH | changed)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: {said}")


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (
            {"IS_MASTER": "false", "RENDEZVOUS": "read_timeout=1"},
            "--rdzv-endpoint=127.0.0.1:{port}: no launcher answers there; start that node, or name another",
        ),
        (
            {"IS_MASTER": "true", "RENDEZVOUS": "join_timeout=1"},
            "--nnodes=2: too few nodes joined at 127.0.0.1:{port}; start the others, or allow fewer",
        ),
    ],
    ids=["master", "others"],
)
def test_nodes_that_do_not_come(variables: dict[str, str], said: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANKS_PER_NODE": "1"}
    done = node("demo", PYTHON=sys.executable, PYTHONPATH=str(ROOT), **place, **variables)
    # torch's own stores print what they have seen before.
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, f"error: {said.format(port=port)}")


@pytest.mark.parametrize("argv", [[], ["--resume"]], ids=str)
def test_wrong_usage(argv: list[str]) -> None:
    done = node(*argv, **ENOUGH)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: usage: launch/node.sh RECIPE")


def variables(**environment: str) -> dict[str, str]:
    """Return what env.sh leaves in the environment."""
    words = ["bash", "-c", f"ranks=1; . {SCRIPT.parent / 'env.sh'}; env"]
    done = subprocess.run(
        words, capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin", **environment}
    )
    return dict(line.partition("=")[::2] for line in done.stdout.splitlines())


def test_the_environment_of_cuda_is_set_where_nobody_has() -> None:
    found = variables()
    assert found["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert found["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    found = variables(PYTORCH_CUDA_ALLOC_CONF="backend:native", CUDA_DEVICE_MAX_CONNECTIONS="1")
    assert "PYTORCH_ALLOC_CONF" not in found, "the older name counts too"
    assert found["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
