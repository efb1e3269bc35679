"""The lock of a run folder: one job at a time works in it.

Rank 0 locks `run.lock` as long as it lives; the kernel releases the lock of a dead owner. Some file systems do not show
nodes each other's locks (NFS without a lock daemon, some Lustre mounts). There the content of the file decides: a live
owner increases a counter in it, and an owner that has stopped counting is dead.

    the kernel's lock is ours, and the file names no owner on another host ──► ours
    else: its owner does not count for `patience_s` ──► our name in it ──► still there two beats later ──► ours
"""

import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from steptron.errors import RecipeError

NAME = "run.lock"

BEAT_S = 5.0
"""The seconds between two counts of a live owner."""

PATIENCE_S = 30.0
"""The seconds without a count after which an owner on another host is considered dead."""


class _HeldError(RecipeError):
    """A live process has the lock."""


@contextmanager
def lock(folder: Path, wait_s: float = 0.0, beat_s: float = BEAT_S, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Hold the lock of the folder.

    Raises `RecipeError` if a live process holds it for longer than `wait_s`, or if the file cannot be written.
    """
    me = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "token": os.urandom(8).hex(),
    }
    file = _File(folder)
    try:
        _wait(wait_s, lambda: _claim(file, me, patience_s, 2 * beat_s))
        done = threading.Event()
        thread = threading.Thread(target=_beat, args=(file, me, done, beat_s), name="lock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            with suppress(OSError):  # if a full disk ends the run, that is the error to show
                os.ftruncate(file.descriptor, 0)
    finally:
        file.close()


def owner(folder: Path) -> str | None:
    """Return the owner of the folder in words, or None without one.

    It takes no lock, so it may name a dead owner on another host.
    """
    try:
        descriptor = os.open(folder / NAME, os.O_RDONLY)
    except OSError:
        return None
    try:
        found = _read(descriptor)
    finally:
        os.close(descriptor)
    if not found or (found["host"] == socket.gethostname() and not Path(f"/proc/{found['pid']}").exists()):
        return None
    return _name(found)


class _File:
    """The lock file of a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.descriptor = -1

    def look(self) -> tuple[dict[str, Any], bool]:
        """Return the owner in the file, and whether we hold the kernel's lock (never on file systems without locks).

        Raises `RecipeError` if another process holds it, or if the file cannot be opened. The file is opened anew each
        time, because only then does NFS show what other nodes have written. Closing it releases the lock.
        """
        self.close()
        try:
            self.descriptor = os.open(self.folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise self.cannot_be_written(error) from error
        try:
            locks = try_lock(self.descriptor)
        except OSError:
            return _read(self.descriptor), False
        if not locks:
            raise self.held(_read(self.descriptor))
        return _read(self.descriptor), True

    def held(self, found: dict[str, Any]) -> _HeldError:
        """Return the error that names the owner."""
        who = _name(found) if found else "another process"
        return _HeldError(f"{self.folder} is being trained by {who}; stop that run first, or wait for its end")

    def cannot_be_written(self, error: OSError) -> RecipeError:
        """Return the error for a folder that cannot be written."""
        return RecipeError(
            f"{self.folder} cannot be written: {error.strerror}; a run needs its folder: make room, or fix its "
            "permissions"
        )

    def close(self) -> None:
        """Close the file if it is open."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1


def _wait(wait_s: float, claim: Callable[[], None]) -> None:
    give_up, told = time.monotonic() + wait_s, False
    while True:
        try:
            return claim()
        except _HeldError as held:
            if time.monotonic() >= give_up:
                raise
            if not told:
                print(f"waiting up to {wait_s:.0f} s: {held}", file=sys.stderr, flush=True)
            told = True
        time.sleep(1.0)


def _claim(file: _File, me: dict[str, Any], patience_s: float, settle_s: float) -> None:
    """Make us the owner. Raises `RecipeError` if another process is, or if the file cannot be written."""
    found, locks = file.look()
    by_content = not locks or (bool(found) and found["host"] != me["host"])
    deadline = time.monotonic() + patience_s
    while by_content and found and time.monotonic() < deadline:
        time.sleep(min(1.0, patience_s / 10))
        now, _ = file.look()
        if now and now != found:
            raise file.held(now)
        found = now
    try:
        _write(file.descriptor, me, 0)
    except OSError as error:
        raise file.cannot_be_written(error) from error
    # Others may have found the file free at the same time, or may be alive but late. The last one to write keeps it,
    # and a live owner counts once more.
    deadline = time.monotonic() + settle_s
    while by_content and time.monotonic() < deadline:
        time.sleep(min(1.0, settle_s / 10))
        found, _ = file.look()
        if found.get("token") != me["token"]:
            raise file.held(found)


def try_lock(descriptor: int) -> bool:
    """Return whether we hold the lock of the file now. Raises `OSError` if the file system has no locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # which of them says that another holds it depends on the system
        return False
    return True


def _name(found: dict[str, Any]) -> str:
    return f"process {found['pid']} on host {found['host']}, since {found['since']}"


def _beat(file: _File, me: dict[str, Any], done: threading.Event, beat_s: float) -> None:
    count = 0
    while not done.wait(beat_s):
        count += 1
        with suppress(OSError):  # a full disk must not end the ownership
            _write(file.descriptor, me, count)


def _read(descriptor: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:  # empty, or incomplete
        return {}
    return found if isinstance(found, dict) and {"pid", "host", "since"} <= set(found) else {}


def _write(descriptor: int, me: dict[str, Any], count: int) -> None:
    os.pwrite(descriptor, json.dumps(me | {"count": count}).ljust(512).encode(), 0)
    os.fsync(descriptor)  # otherwise an NFS client may keep it for half a minute
