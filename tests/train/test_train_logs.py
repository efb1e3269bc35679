"""The log of a rank on a disk that takes no more."""

import logging
from pathlib import Path

import pytest

from steptron.train import build


def test_what_fails_leaves_no_handlers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build.dist, "get_rank", lambda: 0)
    before = list(build.log.handlers)
    with build.logs(tmp_path):
        inside = list(build.log.handlers)
    assert len(inside) == len(before) + 2
    failing = build.logs(tmp_path)
    failing.__enter__()
    assert not failing.__exit__(ValueError, ValueError("a bug"), None)
    assert build.log.handlers == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a file that is always full")
def test_a_full_disk_costs_the_lines_alone(capfd: pytest.CaptureFixture[str]):
    log, handler = logging.getLogger("steptron.full"), build._LogFile("/dev/full")
    log.propagate = False
    log.addHandler(handler)
    log.error("a line")
    log.removeHandler(handler)
    handler.close()
    assert capfd.readouterr() == ("", "")
