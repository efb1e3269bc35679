"""Debian packages that tests need, installed where they are missing."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

APT = ("apt-get", "-o", "DPkg::Lock::Timeout=600")


def need(programs: tuple[str, ...], packages: tuple[str, ...]) -> None:
    """Install `packages` where one of `programs` is missing. Skips where that takes rights this user does not have;
    fails where it fails.

    Test workers that need packages at the same time take turns: apt-get does not wait for another one's package
    lists."""
    with (Path(tempfile.gettempdir()) / f"steptron-apt-{os.getuid()}.lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        if all(map(shutil.which, programs)):
            return
        wanted = ", ".join(programs)
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            pytest.skip(f"needs {wanted}, and cannot install {' '.join(packages)} without root and apt-get")
        for command in ((*APT, "update"), (*APT, "install", "-y", "--no-install-recommends", *packages)):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"needs {wanted}; {' '.join(command)} failed: {done.stderr.strip()}"
