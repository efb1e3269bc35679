"""One process tree at a time works in a run folder.

`run.lock` is locked by rank 0 as long as it lives: the kernel lets go of a dead owner's lock. Where nodes do not see each other's locks
(NFS without a lock daemon, some Lustre mounts) its content speaks: a live owner counts it up, one that has stopped counting is dead.
"""

import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from steptron.errors import RecipeError

NAME = "run.lock"

BEAT_S = 5.0
"""How often a live owner counts up."""

PATIENCE_S = 30.0
"""How long an owner of another host that does not count up is waited for before it is taken for dead."""


@contextmanager
def lock(folder: Path, wait_s: float = 0.0, beat_s: float = BEAT_S, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Hold the folder's lock inside. Raises `RecipeError` where a live process holds it, and does not let go within `wait_s`."""
    try:
        descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RecipeError(
            f"{folder} cannot be written: {error.strerror}; a run needs its folder: mend the rights or the disk"
        ) from error
    try:
        _claim(folder, descriptor, wait_s, patience_s)
        me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        _write(descriptor, me, 0)
        done = threading.Event()
        thread = threading.Thread(target=_beat, args=(descriptor, me, done, beat_s), name="lock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def owner(folder: Path) -> str | None:
    """Who trains in the folder, in words; None where nobody says so. Takes no lock, so a dead owner of another host may be named."""
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


def _claim(folder: Path, descriptor: int, wait_s: float, patience_s: float) -> None:
    give_up, told = time.monotonic() + wait_s, False
    try:
        while not (locks := try_lock(descriptor)):
            held = _held(folder, _read(descriptor))
            if time.monotonic() >= give_up:
                raise held
            if not told:
                print(f"waiting up to {wait_s:.0f} s: {held}", file=sys.stderr, flush=True)
            told = True
            time.sleep(1.0)
    except OSError:
        locks = False  # this file system has none: the content alone speaks
    found = _read(descriptor)
    if not found or (locks and found["host"] == socket.gethostname()):
        return
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        time.sleep(min(1.0, patience_s / 10))
        if _read(descriptor) != found:
            raise _held(folder, _read(descriptor))


def try_lock(descriptor: int) -> bool:
    """Whether the file's lock is ours now. Raises `OSError` where there are no locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # systems have either for a lock that another holds
        return False
    return True


def _held(folder: Path, found: dict[str, Any]) -> RecipeError:
    who = _name(found) if found else "another process"
    return RecipeError(f"{folder} is being trained by {who}; stop that run first, or wait for its end")


def _name(found: dict[str, Any]) -> str:
    return f"process {found['pid']} on host {found['host']}, since {found['since']}"


def _beat(descriptor: int, me: dict[str, Any], done: threading.Event, beat_s: float) -> None:
    count = 0
    while not done.wait(beat_s):
        count += 1
        with suppress(OSError):  # a full disk must not cost the lock
            _write(descriptor, me, count)


def _read(descriptor: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:  # empty, or just being written
        return {}
    return found if isinstance(found, dict) and {"pid", "host", "since"} <= set(found) else {}


def _write(descriptor: int, me: dict[str, Any], count: int) -> None:
    os.pwrite(descriptor, json.dumps(me | {"count": count}).ljust(512).encode(), 0)
