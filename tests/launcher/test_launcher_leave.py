"""A process's end: its exit code is the command's, whatever threads are still in C++."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from steptron.launcher.leave import RAISED_VARIABLE

BUSY = """
import atexit, threading, time, torch
from concurrent.futures import ThreadPoolExecutor
from steptron.launcher.leave import leave_with

def multiply():
    while True:
        torch.mm(a, a)

a = torch.ones(64, 64)
pool = ThreadPoolExecutor(1)
pool.submit(lambda: (time.sleep(0.3), print("the pool's work")))
atexit.register(lambda: print("exit function"))
for _ in range(2):
    threading.Thread(target=multiply, daemon=True).start()
print("printed", end="; ")
"""


@pytest.mark.parametrize(
    ("command", "code", "error"),
    [
        ("lambda: 75", 75, ""),
        ("lambda: __import__('sys').exit(0)", 0, ""),
        ("lambda: 1 // 0", 1, "ZeroDivisionError: integer division or modulo by zero\n"),
    ],
)
def test_threads_in_torch_do_not_change_the_exit_code(command: str, code: int, error: str) -> None:
    words = [sys.executable, "-c", f"{BUSY}\nleave_with({command})"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stderr.endswith(error)
    assert bool(done.stderr) == bool(error)
    assert done.stdout == "printed; the pool's work\nexit function\n"


def test_a_rank_whose_launcher_has_gone_shows_its_traceback_itself(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "from steptron.launcher.leave import leave_with\nleave_with(lambda: 1 // 0)"]
    for folder, shown in ((tmp_path / "gone", True), (tmp_path, False)):
        environment = {**os.environ, "RANK": "3", RAISED_VARIABLE: str(folder)}
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        assert done.returncode == 1
        assert ("ZeroDivisionError" in done.stderr) == shown
    assert "ZeroDivisionError" in (tmp_path / "raised-3").read_text()
