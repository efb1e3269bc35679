"""The file system: each promise really tried, and broken on purpose."""

import errno
import os
import time
from pathlib import Path

import pytest
from findings import bad, by_name
from steptron.doctor import files


def test_a_sound_file_system_leaves_nothing_behind(tmp_path):
    findings = list(files.file_system(tmp_path))
    assert [finding.name for finding in findings] == ["disk", "write", "rename", "locks"]
    assert bad(findings).keys() <= {"disk"}, "which may be little here"
    assert list(tmp_path.iterdir()) == []


def test_the_place_is_the_nearest_folder_that_is_there(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert files.place_of(Path("runs/a/b")) == tmp_path / "runs"
    assert files.place_of(Path("elsewhere/a")) == tmp_path


def test_a_place_that_cannot_be_written():
    found = by_name(files.file_system(Path("/proc")))["write"]
    assert found.state == "failed"
    assert found.found.startswith("/proc cannot be written: ")
    assert "run.dir=" in found.fix


def test_little_room(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LITTLE", 1 << 80)
    found = by_name(files.file_system(tmp_path))["disk"]
    assert (found.state, found.found.endswith("that is not much")) == ("note", True)


def test_a_disk_that_cannot_sync(tmp_path, monkeypatch):
    def broken(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    assert bad(files.file_system(tmp_path))["write"] == "failed"


def test_a_rename_that_is_a_copy(tmp_path, monkeypatch):
    """As file systems do it that have none: the old file goes first, and the new one grows."""

    def copy(new: Path, old: Path) -> None:
        os.unlink(old)
        time.sleep(0.002)
        old.write_text(new.read_text())

    monkeypatch.setattr(os, "replace", copy)
    found = by_name(files.file_system(tmp_path))["rename"]
    assert found.state == "failed"
    assert "for a moment" in found.found


LOCKERS = {
    "two processes hold the same lock": 'print("held", flush=True); import time; time.sleep(60)',
    "locks are refused: OSError: [Errno 37] No locks available": 'raise OSError(37, "No locks available")',
    "no lock is granted within 0.2 s": "import time; time.sleep(60)",
    # the one that is killed has had another one take the lock
    "a dead process keeps its lock": "import subprocess, sys; subprocess.Popen([sys.executable, '-c', "
    '\'import fcntl, sys, time; f = open(sys.argv[1], "r+b"); fcntl.lockf(f, fcntl.LOCK_EX); print("held", flush=True); '
    "time.sleep(30)', sys.argv[1]]).wait()",
}


@pytest.mark.parametrize(("found", "locker"), LOCKERS.items(), ids=["no locks", "refused", "silent", "kept"])
def test_locks_that_are_none(tmp_path, monkeypatch, found, locker):
    monkeypatch.setattr(files, "LOCKER", locker)
    if "0.2" in found:
        monkeypatch.setattr(files, "LOCK_S", 0.2)
    finding = by_name(files.file_system(tmp_path))["locks"]
    assert (finding.state, finding.found) == ("failed", found)
    assert "nolock" in finding.fix
