"""The log of a rank on a disk that takes no more."""

import logging
from pathlib import Path

import pytest

from steptron.train import build


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a file that is always full")
def test_a_full_disk_costs_the_lines_alone(capfd: pytest.CaptureFixture[str]):
    log, handler = logging.getLogger("steptron.full"), build._LogFile("/dev/full")
    log.propagate = False
    log.addHandler(handler)
    log.error("a line")
    log.removeHandler(handler)
    handler.close()
    assert capfd.readouterr() == ("", "")
