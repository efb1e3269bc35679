"""Files that are replaced in one go: on a disk that is full the old one stays, and nothing else does."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_disks import fill, needs_root, small_disk

from steptron.atomic import replacing
from steptron.config.resolve import resolve
from steptron.errors import RecipeError
from steptron.monitor.dashboard import report
from steptron.monitor.storage.files import Folder
from steptron.monitor.storage.ledger import Judged, Ledger
from steptron.train.build import keep_recipe

SMALL = str(Path(__file__).parent / "config" / "small.yaml")


def _replace(folder: Path) -> None:
    with replacing(folder / "file") as temporary:
        temporary.write_bytes(bytes(1 << 20))


def _keep_judged(folder: Path) -> None:
    values = {"loss": np.random.default_rng(0).random(1 << 17)}
    if Ledger(folder).keep(3, Judged(stage="base", detectors={}, policy={}, values=values)) is None:
        raise OSError("No space left on device, as its log says")


WRITERS: dict[str, Callable[[Path], object]] = {
    "replacing": _replace,
    "recipe.yaml": lambda folder: keep_recipe(resolve(SMALL), folder),
    "report.html": report.write_report,
    "a registry of the plane": lambda folder: Folder.at(folder).write_bytes(f"{folder}/file", bytes(1 << 20)),
    "what a step was judged by": _keep_judged,
}


@needs_root
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_keeps_the_old_file_and_no_part_of_the_new(tmp_path: Path, name: str) -> None:
    with small_disk(tmp_path / "disk", 256) as disk:
        for old in ("file", "recipe.yaml", "report.html"):
            (disk / old).write_text("old: 1")
        (disk / "ledger.jsonl").touch()
        (disk / "judged").mkdir()
        fill(disk)
        before = {path: path.read_bytes() for path in sorted(disk.rglob("*")) if path.is_file()}
        with pytest.raises((OSError, RecipeError), match="No space left on device"):
            WRITERS[name](disk)
        assert {path: path.read_bytes() for path in sorted(disk.rglob("*")) if path.is_file()} == before


def _fail_half_way(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("new")
        raise ZeroDivisionError


def test_an_error_of_the_writer_is_its_own(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError):
        _fail_half_way(path)
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("file", "old")]


@pytest.mark.parametrize("synced", [False, True])
def test_the_new_file_takes_the_place_of_the_old_one(tmp_path: Path, synced: bool) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path, synced=synced) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("file", "new")]
