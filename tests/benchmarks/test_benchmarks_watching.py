"""The benchmark of what watching costs runs, on a recipe that is small enough here; its goal is for a quiet machine."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "watching.py"


def test_it_steps_in_turn_and_says_what_it_found():
    words = [
        sys.executable,
        SCRIPT,
        "--recipe",
        "demo",
        "--rounds",
        "1",
        "--pairs",
        "2",
        "stages.base.ramp.0.batch_size=4",
        "stages.base.micro_batch=4",
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert "full ÷ off" in done.stdout
