"""Processes for tests of Triton's kernels: the interpreter is chosen by the environment when a module is imported, and
neither it nor the compiler can look through the checks of shapes that the tests put around every function."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


def child(script: str, task: str, **environment: str) -> Any:
    """Run a test file as a script with this word, and return the JSON that it prints. The interpreter is off unless the
    environment says otherwise."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS / "moe")))
    command = [sys.executable, "-W", "ignore", script, task]
    environment = inherited | {"PYTHONPATH": paths} | environment
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
