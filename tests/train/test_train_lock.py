"""One owner at a time: a live one is respected, a dead one is not, on this host and on others."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from steptron.errors import RecipeError
from steptron.train.lock import NAME, lock

HOLD = """
import sys, time
from pathlib import Path
from steptron.train.lock import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_live_owner_is_named_and_a_dead_one_forgotten(tmp_path: Path):
    process = holder(tmp_path)
    with pytest.raises(RecipeError, match=f"is being trained by process {process.pid} on host"), lock(tmp_path):
        pass
    process.kill()
    process.wait()
    start = time.monotonic()
    with lock(tmp_path, patience_s=60):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert time.monotonic() - start < 5, "the kernel knows that an owner of this host is dead"
    with lock(tmp_path):
        pass


def test_one_that_ends_is_waited_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    process = holder(tmp_path)
    timer = threading.Timer(1.5, process.kill)
    timer.start()
    start = time.monotonic()
    with lock(tmp_path, wait_s=60):
        assert 1.0 < time.monotonic() - start < 30
    process.wait()
    assert capfd.readouterr().err.startswith(f"waiting up to 60 s: {tmp_path} is being trained by process")


def write_owner(folder: Path, count: int) -> None:
    owner = {"host": "gpu07", "pid": 12, "since": "2026-01-01 00:00:00", "count": count}
    (folder / NAME).write_text(json.dumps(owner).ljust(512))


def test_an_owner_on_another_host_that_counts_up_is_alive(tmp_path: Path):
    write_owner(tmp_path, 0)
    done = threading.Event()

    def beat() -> None:
        count = 0
        while not done.wait(0.05):
            count += 1
            write_owner(tmp_path, count)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(RecipeError, match="process 12 on host gpu07"), lock(tmp_path, patience_s=20):
            pass
    finally:
        done.set()
        thread.join()


def test_an_owner_on_another_host_that_has_stopped_is_waited_for_and_forgotten(tmp_path: Path):
    write_owner(tmp_path, 7)
    start = time.monotonic()
    with lock(tmp_path, patience_s=0.5):
        assert time.monotonic() - start >= 0.5
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_an_owner_counts_up(tmp_path: Path):
    with lock(tmp_path, beat_s=0.02):
        first = json.loads((tmp_path / NAME).read_text())["count"]
        time.sleep(0.3)
        assert json.loads((tmp_path / NAME).read_text())["count"] > first
    assert (tmp_path / NAME).read_text() == ""


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    with pytest.raises(RecipeError, match="cannot be written: No such file or directory"), lock(tmp_path / "none"):
        pass
