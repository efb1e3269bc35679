"""Files that are replaced in one step: a full disk keeps the old one and nothing of the new one; what resume reads is
on the disk before its name is, and its name is on the disk when the writer returns."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from steptron.atomic import atomic_folder, atomic_write
from steptron.checkpoint.find import put_aside
from steptron.checkpoint.remote import Remote
from steptron.cli.main import main
from steptron.config.identity import at_start
from steptron.config.resolve import resolve
from steptron.errors import RecipeError
from steptron.monitor.dashboard import report
from steptron.monitor.storage.files import Folder
from steptron.monitor.storage.ledger import Judged, Ledger
from steptron.train.run_folder import make_run_dir, write_identity, write_recipe

from disk_calls import recorded
from small_disks import fill, needs_root, small_disk

SMALL = str(Path(__file__).parent / "config" / "small.yaml")


def _replace(folder: Path) -> None:
    with atomic_write(folder / "file") as temporary:
        temporary.write_bytes(bytes(1 << 20))


def _keep_judged(folder: Path) -> None:
    values = {"loss": np.random.default_rng(0).random(1 << 17)}
    if Ledger(folder).keep(3, Judged(stage="base", detectors={}, policy={}, values=values)) is None:
        raise OSError("No space left on device, as its log says")


WRITERS: dict[str, Callable[[Path], object]] = {
    "atomic_write": _replace,
    "recipe.yaml": lambda folder: write_recipe(resolve(SMALL), folder),
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
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        raise ZeroDivisionError


def test_an_error_of_the_writer_is_its_own(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError):
        _fail_half_way(path)
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("file", "old")]


@pytest.mark.parametrize("durable", [False, True])
def test_the_new_file_takes_the_place_of_the_old_one(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_write(path, durable=durable) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("file", "new")]


def _data(folder: Path) -> None:
    (folder / "text").mkdir()
    (folder / "text" / "page.txt").write_text("One page of text. " * 50)
    assert main(["data", "build", str(folder / "text"), "--out", str(folder / "data"), "--vocab-size", "265"]) == 0


def _bring_records(folder: Path) -> None:
    recipe = resolve(SMALL)
    write_recipe(recipe, folder)
    write_identity(at_start(None, folder), folder)
    Ledger(folder).write("checkpoint", 3)
    (folder / "place").mkdir()
    Remote(str(folder / "place")).keep_records(folder)
    Remote(str(folder / "place")).bring_records(folder / "new")


def _put_aside(folder: Path) -> None:
    (folder / "checkpoints" / "step-00000020").mkdir(parents=True)
    put_aside(folder / "checkpoints", 10)


DURABLE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "recipe.yaml": (lambda folder: write_recipe(resolve(SMALL), folder), ["recipe.yaml"]),
    "run.json": (lambda folder: write_identity(at_start(None, folder), folder), ["run.json"]),
    "what a step was judged by": (_keep_judged, ["judged/step-00000003.npz"]),
    "records of a lost disk": (_bring_records, ["new/ledger.jsonl", "new/run.json", "new/recipe.yaml"]),
    "tokenizer and source": (_data, ["data/tokenizer.json", "data/text"]),
    "checkpoints put aside": (_put_aside, ["checkpoints/abandoned-step-00000020"]),
}


@pytest.mark.parametrize("name", DURABLE)
def test_what_resume_reads_survives_a_power_failure(tmp_path: Path, name: str) -> None:
    """All of the content is synced before the rename, and the parent folder after it."""
    write, files = DURABLE[name]
    with recorded() as calls:
        write(tmp_path)
    for path in (tmp_path / file for file in files):
        if name != "checkpoints put aside":  # a checkpoint was synced when it was saved
            assert calls.unsynced[path] == [], f"{path.name} was renamed before it was on the disk"
        after = calls.order[calls.order.index(("rename", path)) + 1 :]
        assert ("sync", path.parent) in after, f"the new name of {path.name} is not on the disk"


def _fail_to_fill(path: Path) -> None:
    with atomic_folder(path) as folder:
        assert not list(folder.iterdir())
        (folder / "half").touch()
        raise ZeroDivisionError


def test_a_run_folder_and_its_ledger_survive_a_power_failure(tmp_path: Path) -> None:
    """A new name is on the disk when the folder that it is in was synced after it was made."""
    run = tmp_path / "runs" / "new"
    with recorded() as calls:
        make_run_dir(run)
        Ledger(run).write("checkpoint", 1)
        Ledger(run).write("checkpoint", 2)
    ledger = ("sync", run / "ledger.jsonl")
    assert set(calls.order[:2]) == {("sync", tmp_path), ("sync", tmp_path / "runs")}
    assert calls.order[2:] == [ledger, ("sync", run), ledger]


def test_a_folder_is_complete_or_absent(tmp_path: Path) -> None:
    (tmp_path / ".tmp-new").mkdir()
    (tmp_path / ".tmp-new" / "of a killed process").touch()
    with pytest.raises(ZeroDivisionError):
        _fail_to_fill(tmp_path / "new")
    assert not list(tmp_path.iterdir())
    with recorded() as calls, atomic_folder(tmp_path / "new") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("text")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "new",
        "new/deep",
        "new/deep/file",
    ]
    synced = [(call, path.name) for call, path in calls.order]
    assert synced[-2:] == [("rename", "new"), ("sync", tmp_path.name)]
    assert set(synced[:-2]) == {("sync", name) for name in (".tmp-new", "deep", "file")}


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_write(path) as first, atomic_write(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first", "the last rename wins"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
