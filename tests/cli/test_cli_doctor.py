"""The doctor's table and exit code, on this process and on two real ranks; each check by itself is in tests/doctor."""

import json
import sys
from importlib import metadata
from pathlib import Path

import pytest
from steptron.cli.main import main
from steptron.config.resolve import resolve
from steptron.doctor import examine, network
from steptron.model.transformer import Transformer
from steptron.train.run_folder import write_recipe

from forks import run

ROOT = Path(__file__).parents[2]
SMALL = str(ROOT / "tests" / "config" / "small.yaml")
ROWS = [
    *("Python", "packages", "deepspeed", "memory", "shared memory", "CPU", "CUDA", "disk", "write", "rename", "locks"),
    *("Slurm", "loopback", "own address", "port", "gloo", "NCCL", "clocks"),
]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_a_machine_that_runs_these_tests_is_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    first = [line.strip().split("  ")[0] for line in out.splitlines()]
    assert [row for row in first if row in ROWS] == ROWS
    assert out.endswith("nothing required is missing\n")


def test_what_fails_is_named_with_its_fix(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", SMALL]) == 1
    out = capsys.readouterr().out
    assert "→ build it with `steptron data build`" in out
    assert out.endswith("failed: data.tokenizer, data.sources.prose, data.sources.code\n")


def test_a_recipe_that_is_wrong_is_the_users_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", SMALL, "sed=1"]) == 2
    assert capsys.readouterr().err == "error: sed: a recipe has no key 'sed'; nearest: seed\n"


def test_doctor_and_inspect_count_the_same_parameters(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both say what a built model has as `Parameter`s. Its buffers, the router biases, do not count."""
    monkeypatch.chdir(tmp_path)
    recipe = resolve(SMALL)
    write_recipe(recipe, tmp_path)
    model = Transformer(recipe.model)
    count = sum(parameter.numel() for parameter in model.parameters())
    buffers = dict(model.named_buffers())
    assert buffers
    assert all(name.endswith(".router.bias") for name in buffers)
    main(["doctor", SMALL])
    assert f" {count:,} parameters, " in capsys.readouterr().out
    assert main(["inspect", str(tmp_path)]) == 0
    assert f" {count:,} parameters " in capsys.readouterr().out
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == count


def test_without_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "torch":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(examine, "find_spec", lambda module: None)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["doctor", SMALL]) == 1
    assert capsys.readouterr().out.endswith("failed: torch\n")


def test_ranks_that_do_not_come_together(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(network, "MEET_S", 0.5)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "cannot connect at 127.0.0.1:0" in out
    assert out.endswith("failed: ranks\n")
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    assert main(["doctor"]) == 1
    assert "cannot connect at no-such-host.invalid:0: [Errno" in capsys.readouterr().out


def test_two_ranks_print_one_table_and_leave_alike(tmp_path: Path) -> None:
    words = [
        "-m",
        "steptron.launcher.torchrun",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "steptron",
        "doctor",
        SMALL,
    ]
    done = run([sys.executable, *words], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.count("finding → fix") == 1
    assert "a sum over 2 ranks" in done.stdout
    assert "parallel.dense.dp_shard=2 · parallel.expert.dp_shard=2" in " ".join(done.stdout.split())
