"""The doctor: what it finds here, and that it says what is missing."""

import sys
from importlib import metadata
from pathlib import Path

import pytest

from steptron.cli import doctor
from steptron.cli.main import main

SMALL = str(Path(__file__).parents[1] / "config" / "small.yaml")


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_a_machine_that_runs_these_tests_is_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for row in (
        "Python",
        "packages",
        "torch ",
        "CPU",
        "CUDA",
        "gloo",
        "NCCL",
        "memory",
        "/dev/shm",
        "disk",
        "deepspeed",
        "Slurm",
    ):
        assert row in out
    assert "all that is required is there" in out


def test_gloo_is_really_tried(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no route\nto host")

    monkeypatch.setattr("torch.distributed.all_reduce", broken)
    try:
        assert main(["doctor"]) == 2
    finally:
        import torch.distributed as dist

        assert not dist.is_initialized()
    out = capsys.readouterr().out
    assert "no route to host" in out
    assert "missing: gloo" in out


def test_a_package_that_is_too_old(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1" if name == "tokenizers" else real(name))
    assert main(["doctor"]) == 2
    out = capsys.readouterr().out
    assert "0.1 is installed; needs tokenizers>=" in out
    assert "missing: tokenizers" in out


def test_optional_packages_say_what_they_add(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda module: None)
    findings = list(doctor.optional_packages())
    assert {finding.state for finding in findings} == {"note"}
    assert all("would add" in finding.detail for finding in findings)


def test_a_recipe_whose_data_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for source in ("prose", "code"):
        (tmp_path / "data" / "small" / source).mkdir(parents=True)
        (tmp_path / "data" / "small" / source / "source.json").write_text("{}")
    (tmp_path / "data" / "small" / "tokenizer.json").write_text("{}")
    assert {finding.state for finding in doctor.recipe_data(SMALL, [], None)} == {"ok"}


def test_a_recipe_whose_data_is_not(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", SMALL]) == 2
    out = capsys.readouterr().out
    assert "missing: data.tokenizer, data.sources.prose, data.sources.code" in out
    assert "steptron data build" in out


def test_a_recipe_that_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", SMALL, "sed=1"]) == 2
    assert capsys.readouterr().err == "error: sed: a recipe has no key 'sed'; nearest: seed\n"


def test_without_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "torch":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(doctor, "find_spec", lambda module: None)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["doctor"]) == 2
    assert "missing: torch" in capsys.readouterr().out
