"""The benchmark of short waits: what it makes of times that are known, and that everything it measures runs."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "latency.py"


@pytest.fixture(scope="module")
def latency():
    spec = importlib.util.spec_from_file_location("latency", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_contestants_take_turns_in_changing_order(latency):
    order = []
    acts = {name: lambda name=name: order.append(name) or float(len(order)) for name in ("a", "b", "c")}
    assert latency.in_turn(3, acts) == {"a": [3.0, 4.0, 9.0], "b": [2.0, 5.0, 8.0], "c": [1.0, 6.0, 7.0]}
    assert "".join(order) == "cbaabccba"


@pytest.mark.parametrize(("third", "code", "met"), [(3.0, 0, 2), (9.0, 1, 1)], ids=["all met", "one missed"])
def test_ratios_are_medians_of_turns_and_a_missed_goal_is_exit_code_1(latency, monkeypatch, capsys, third, code, met):
    """Ratios of the turns are 2, 4 and `third` in one group: their median, not that of the times, counts."""
    times = {"reference": [1.0, 10.0, 100.0], "one": [2.0, 40.0, third * 100.0], "two": [0.5, 5.0, 50.0]}
    monkeypatch.setattr(latency, "MEASURES", (lambda rounds: times,))
    monkeypatch.setattr(latency, "GOALS", {"one": 3.5, "two": 0.6})
    monkeypatch.setattr(sys, "argv", ["latency.py"])
    assert latency.main() == code
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == f"goals: {met} of 2 met"
    [row] = [line for line in said.splitlines() if " one " in line]
    assert row.split("│")[3].strip() == ("3.00" if code == 0 else "4.00")


def test_everything_with_a_goal_is_measured(latency):
    measured = {name for measure in latency.MEASURES for name, seconds in measure(1).items() if min(seconds) > 0}
    assert latency.GOALS.keys() <= measured
