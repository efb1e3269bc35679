"""Exit codes through torchrun, with real ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, signal, sys, time
rank, what = int(os.environ["RANK"]), sys.argv[1]
if what == "all-2":
    sys.exit(2)
if what == "second-75" and rank == 1:
    sys.exit(75)
if what == "second-killed" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if what != "well":
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("what", "code", "printed"),
    [
        ("well", 0, ""),
        ("all-2", 2, ""),
        ("second-75", 75, ""),
        ("second-killed", 137, "error: rank 1 was killed by SIGKILL; the machine may have run out of memory\n"),
    ],
)
def test_the_first_failing_rank_gives_the_code(what: str, code: int, printed: str, tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "steptron.cli.torchrun", "--standalone", "--nproc-per-node", "2", str(script), what],
        capture_output=True,
        text=True,
        timeout=60,
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "", printed)
