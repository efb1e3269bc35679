"""Benchmarks are scripts, no package: tests of what they compute import them by name."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS.parent / "benchmarks"), str(TESTS / "moe")]  # gpu_parts imports helpers of tests/moe
