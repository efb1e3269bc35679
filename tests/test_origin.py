"""The commit and the command line of a process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from steptron.origin import command, commit, origin

GIT = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]


def git(folder: Path, *words: str) -> str:
    return subprocess.run([*GIT, "-C", str(folder), *words], check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    package = tmp_path / "package"
    package.mkdir()
    assert commit(package) == "", "no checkout"
    monkeypatch.delenv("GIT_DIR")
    git(tmp_path, "init", "-q")
    (package / "a.py").write_text("1\n")
    assert commit(package) == "", "the folder is not tracked"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "notes").write_text("not tracked")
    assert commit(package) == head
    (package / "a.py").write_text("2\n")
    assert commit(package) == f"{head}+changes"


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(Path(__file__).parent) == ""


def test_the_command_line_can_be_typed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/venv/bin/steptron", "train", "demo", "run.name='a b'"])
    assert command() == """steptron train demo 'run.name='"'"'a b'"'"''"""
    monkeypatch.setattr(sys, "argv", ["/site-packages/steptron/__main__.py", "train", "demo"])
    assert command() == "steptron train demo"


def test_versions_are_those_that_are_imported() -> None:
    assert origin()["torch"] == torch.__version__.partition("+")[0] or origin()["torch"] == torch.__version__
    assert origin()["python"] == sys.version.split()[0]
