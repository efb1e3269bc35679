"""Benchmarks are scripts, no package: tests of what they compute import them by name."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
