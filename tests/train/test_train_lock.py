"""One owner at a time: a live one is respected, a dead one is not, on this host and on others."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from steptron.errors import RecipeError
from steptron.train import lock as module
from steptron.train.lock import NAME, lock

from waiting import PATIENCE_S, wait_until

HOLD = """
import sys, time
from pathlib import Path
from steptron.train.lock import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(10_000)  # until it is killed
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_live_owner_is_named_and_a_dead_one_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    process = holder(tmp_path)
    with pytest.raises(RecipeError, match=f"is being trained by process {process.pid} on host"), lock(tmp_path):
        pass
    process.kill()
    process.wait()
    with monkeypatch.context() as patch:
        patch.setattr(module.time, "sleep", lambda seconds: pytest.fail("the kernel knows that the owner is dead"))
        with lock(tmp_path, patience_s=60):
            assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    with lock(tmp_path):
        pass


def test_one_that_ends_is_waited_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    process = holder(tmp_path)
    timer = threading.Timer(1.5, process.kill)
    timer.start()
    with lock(tmp_path, wait_s=PATIENCE_S):
        assert process.wait() == -signal.SIGKILL
    said = capfd.readouterr().err
    assert said.startswith(f"waiting up to {PATIENCE_S:.0f} s: {tmp_path} is being trained by process")
    assert said.count("\n") == 1


def write_owner(folder: Path, count: int) -> None:
    owner = {"host": "gpu07", "pid": 12, "since": "2026-01-01 00:00:00", "count": count}
    (folder / "new").write_text(json.dumps(owner).ljust(512))
    (folder / "new").replace(folder / NAME)  # as on NFS, who has the file open does not see it


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
    with lock(tmp_path, beat_s=0.1, patience_s=0.5):
        assert time.monotonic() - start >= 0.7
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_an_owner_that_was_only_late_keeps_it(tmp_path: Path):
    write_owner(tmp_path, 7)

    def beat() -> None:
        while json.loads((tmp_path / NAME).read_text())["pid"] != os.getpid():
            time.sleep(0.01)
        write_owner(tmp_path, 8)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    with pytest.raises(RecipeError, match="process 12 on host gpu07"), lock(tmp_path, beat_s=5, patience_s=0.1):
        pass
    thread.join()


@pytest.mark.parametrize("dead", [False, True], ids=["free", "dead-owner"])
def test_of_two_that_come_at_once_one_gets_it_without_locks_too(
    dead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if dead:
        write_owner(tmp_path, 7)
    both, write = threading.Barrier(2), module._write
    held: list[int] = []
    refused: list[str] = []
    one_left = threading.Event()

    def no_locks(descriptor: int) -> bool:
        raise OSError(errno.ENOLCK, "No locks available")

    def write_at_once(descriptor: int, me: dict, count: int) -> None:
        if count == 0:
            both.wait(PATIENCE_S)  # both have found the file free
        write(descriptor, me, count)

    def claim() -> None:
        try:
            with lock(tmp_path, beat_s=1, patience_s=0.1):
                held.append(json.loads((tmp_path / NAME).read_text())["pid"])
                one_left.wait(PATIENCE_S)
        except RecipeError as error:
            refused.append(str(error))
            one_left.set()

    monkeypatch.setattr(module, "try_lock", no_locks)
    monkeypatch.setattr(module, "_write", write_at_once)
    threads = [threading.Thread(target=claim) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held == [os.getpid()]
    assert len(refused) == 1
    assert "is being trained by process" in refused[0]


def test_an_owner_counts_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", synced.append)
    with lock(tmp_path, beat_s=0.02):
        first = json.loads((tmp_path / NAME).read_text())["count"]
        count = wait_until(lambda: max(0, json.loads((tmp_path / NAME).read_text())["count"] - first)) + first
        assert len(synced) >= count, "other nodes see it at once"
    assert (tmp_path / NAME).read_text() == ""


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    with pytest.raises(RecipeError, match="cannot be written: No such file or directory"), lock(tmp_path / "none"):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a file that is always full")
def test_a_full_disk(tmp_path: Path):
    (tmp_path / NAME).symlink_to("/dev/full")
    with pytest.raises(RecipeError, match=f"{tmp_path} cannot be written: No space left on device; "), lock(tmp_path):
        pass
