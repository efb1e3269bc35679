"""Shared by all tests: jaxtyped signatures of the maths are checked at every call; files that take long begin first."""

import os

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("WANDB_SILENT", "true")

install_import_hook(["steptron.nn", "steptron.moe", "steptron.optim"], "beartype.beartype")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files that take long in front: begun last, one would run alone while other workers have nothing left to do."""
    items.sort(key=_seconds, reverse=True)


def _seconds(item: pytest.Item) -> int:
    mark = item.get_closest_marker("takes")
    return mark.args[0] if mark else 0
