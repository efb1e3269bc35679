"""The log of a rank on a disk that takes no more."""

import logging
from pathlib import Path

import pytest
from steptron.errors import RecipeError
from steptron.train import log_files

from ranks import run_ranks


def test_what_fails_leaves_no_handlers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(log_files.dist, "get_rank", lambda: 0)
    before = list(log_files.log.handlers)
    with log_files.log_files(tmp_path):
        inside = list(log_files.log.handlers)
    assert len(inside) == len(before) + 2
    failing = log_files.log_files(tmp_path)
    failing.__enter__()
    assert not failing.__exit__(ValueError, ValueError("a bug"), None)
    assert log_files.log.handlers == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a file that is always full")
def test_a_full_disk_costs_the_lines_alone(capfd: pytest.CaptureFixture[str]):
    log, handler = logging.getLogger("steptron.full"), log_files._LogFile("/dev/full")
    log.propagate = False
    log.addHandler(handler)
    log.error("a line")
    log.removeHandler(handler)
    handler.close()
    assert capfd.readouterr() == ("", "")


def open_logs(rank: int, folder: Path) -> str:
    try:
        with log_files.log_files(folder):
            return ""
    except RecipeError as error:
        return str(error)


def test_a_file_that_cannot_be_opened_on_one_rank_is_said_on_all(tmp_path: Path):
    (tmp_path / "logs" / "rank-00001.log").mkdir(parents=True)
    first, second = run_ranks(2, open_logs, tmp_path, tmp_path)
    assert second.startswith(f"run.dir={tmp_path} cannot be written: Is a directory; ")
    assert first == f"rank 1: {second}"
