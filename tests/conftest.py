"""Shared by all tests: jaxtyped signatures of the maths are checked; files that take long begin first; seeds are
printed; workers share the work of collecting, and collect no garbage meanwhile."""

import gc
import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("WANDB_SILENT", "true")

gc.disable()  # imports make 600,000 objects and hardly any garbage; see pytest_collection_finish
install_import_hook(["steptron.nn", "steptron.moe", "steptron.optim"], "beartype.beartype")


def pytest_configure(config: pytest.Config) -> None:
    """Let each worker of xdist begin to collect in another folder.

    A third of a collection's time goes into rewriting asserts, whose result is kept in `__pycache__`. Workers that read
    the same file at the same time would all do it."""
    tests = Path(__file__).parent
    if hasattr(config, "workerinput") and [Path(arg).resolve() for arg in config.args] == [tests]:
        number, count = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        places = sorted(str(path) for path in tests.iterdir() if path.is_dir() or path.match("test_*.py"))
        first = len(places) * number // count
        config.args[:] = places[first:] + places[:first]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files that take long in front: begun last, one would run alone while other workers have nothing left to
    do. The order is the same in all workers."""
    items.sort(key=lambda item: (-_seconds(item), str(item.path)))


def pytest_collection_finish() -> None:
    """Collect garbage from here on, but never look again at what was imported."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    """Give back what was imported: libraries count the objects that are left at the end."""
    gc.unfreeze()


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
