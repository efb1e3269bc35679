"""Shared by all tests: jaxtyped signatures of the maths are checked; files that take long begin first; seeds are
printed."""

import os

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("WANDB_SILENT", "true")

install_import_hook(["steptron.nn", "steptron.moe", "steptron.optim"], "beartype.beartype")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files that take long in front: begun last, one would run alone while other workers have nothing left to
    do."""
    items.sort(key=_seconds, reverse=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests have recorded (`record_property`), such as the seed of a chaos test, also of those that
    passed."""
    for state in ("passed", "failed"):
        for report in terminalreporter.getreports(state):
            for name, value in report.user_properties:
                terminalreporter.write_line(f"{name}={value} ({report.nodeid})")


def _seconds(item: pytest.Item) -> int:
    mark = item.get_closest_marker("takes")
    return mark.args[0] if mark else 0
