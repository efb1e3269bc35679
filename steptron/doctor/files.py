"""Checks of the file system of run folders: the operations that checkpoints, ledgers and resumes need, in a scratch
folder."""

import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from steptron.atomic import sync
from steptron.doctor.finding import Finding, one_line
from steptron.train.lock import try_lock

MIB = 2**20
GIB = 2**30
LITTLE = GIB
"""The number of free bytes below which a disk is too small for any run."""
LOCK_S = 10.0
"""The seconds that a file system may take to grant a lock."""
RENAMES = 50
"""The number of renames over a file that is being read."""

LOCKER = """
import fcntl, sys, time
file = open(sys.argv[1], "r+b")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""
"""The program of the other process in the check of locks."""


def place_of(run_dir: Path) -> Path:
    """Return the folder that a run folder is or would be made in: the nearest parent that exists."""
    place = run_dir.absolute()
    while not place.is_dir():
        place = place.parent
    return place


def file_system(place: Path) -> Iterator[Finding]:
    """Check free space, writing, fsync, rename and locks at `place`."""
    usage = shutil.disk_usage(place)
    found = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free at {place}"
    little = usage.free < LITTLE
    fix = "free some space, or choose another folder with run.dir=…"
    yield Finding(
        "disk", "note" if little else "ok", found + ("; that is not much" if little else ""), fix if little else ""
    )
    try:
        scratch = Path(tempfile.mkdtemp(prefix=".steptron-doctor-", dir=place))
    except OSError as error:
        yield Finding(
            "write", "failed", f"{place} cannot be written: {one_line(error)}", "choose another with run.dir=…"
        )
        return
    try:
        yield _tried("write", _write, scratch, "free some space or repair the disk, or choose another with run.dir=…")
        yield _tried("rename", _rename, scratch, "choose a file system with atomic renames for run.dir=…")
        yield _tried(
            "locks",
            _lock,
            scratch,
            "mount it with locks (NFS: without nolock; Lustre: flock), or choose another with run.dir=…",
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _tried(name: str, act: Callable[[Path], tuple[bool, str]], scratch: Path, fix: str) -> Finding:
    try:
        works, found = act(scratch)
    except OSError as error:
        works, found = False, one_line(error)
    return Finding(name, "ok" if works else "failed", found, "" if works else fix)


def _write(scratch: Path) -> tuple[bool, str]:
    """Write 4 MiB and a folder entry, and sync both to the disk."""
    start = time.perf_counter()
    with (scratch / "data").open("wb") as file:
        file.write(os.urandom(MIB) * 4)
        file.flush()
        os.fsync(file.fileno())
    sync(scratch)
    return True, f"4 MiB with fsync in {1e3 * (time.perf_counter() - start):.0f} ms"


def _rename(scratch: Path) -> tuple[bool, str]:
    """Rename a file over one that another thread keeps reading, and a folder over an empty one."""
    path, new, seen, done = scratch / "file", scratch / "file.new", set(), threading.Event()
    path.write_text("whole 0")

    def read() -> None:
        while not done.is_set():
            try:
                seen.add(path.read_text().split()[0])
            except (OSError, IndexError):
                seen.add("nothing")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        for i in range(RENAMES):
            new.write_text(f"whole {i}")
            os.replace(new, path)
    finally:
        done.set()
        reader.join(LOCK_S)
    if seen != {"whole"}:
        return False, "a file that is renamed over another is missing or incomplete for a moment"
    made, final = scratch / "made", scratch / "final"
    made.mkdir()
    final.mkdir()
    (made / "part").write_text("whole")
    os.rename(made, final)
    sync(scratch)
    if made.exists() or (final / "part").read_text() != "whole":
        return False, "a renamed folder has changed"
    return True, f"{RENAMES} over a file that is being read, one of a folder: complete at all times"


def _lock(scratch: Path) -> tuple[bool, str]:
    """Check that a lock held by another process is refused here, and granted after that process was killed."""
    path = scratch / "lock"
    path.write_bytes(b"lock")
    words = [sys.executable, "-I", "-S", "-c", LOCKER, str(path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None, "it was asked for"
        try:
            if not select.select([holder.stdout], [], [], LOCK_S)[0]:
                return False, f"no lock is granted within {LOCK_S:g} s"
            if holder.stdout.readline() != "held\n":
                assert holder.stderr is not None, "it was asked for"
                return False, f"locks are refused: {holder.stderr.read().strip().rpartition(chr(10))[2]}"
            if takes_lock(path):
                return False, "two processes hold the same lock"
            holder.kill()
            holder.wait()
            if not takes_lock(path):
                return False, "a dead process keeps its lock"
        finally:
            holder.kill()
    return True, "refused to a second process, released by a dead one"


def takes_lock(path: Path) -> bool:
    """Return whether nobody else holds the file's lock. The lock is released at once."""
    with path.open("r+b") as file:
        return try_lock(file.fileno())
