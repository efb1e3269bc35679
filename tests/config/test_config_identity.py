"""Who the run in a folder is: the same after a move, another after a copy, later at each start."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from steptron.config import identity
from steptron.config.identity import Identity, Parent, at_start, is_copy, read, without_place
from steptron.errors import RecipeError


def start(folder: Path, new: bool = False) -> Identity:
    folder.mkdir(exist_ok=True)
    ours = at_start(None if new else read(folder), folder)
    (folder / identity.NAME).write_text(ours.to_json())
    return ours


def test_a_folder_without_one_gets_an_id_of_its_own(tmp_path):
    one, two = start(tmp_path / "one"), start(tmp_path / "two")
    assert read(tmp_path / "one") == one
    assert len({one.id, two.id}) == 2
    assert one.place == str(tmp_path / "one")


def test_the_id_stays_whatever_the_folder_is_called(tmp_path, monkeypatch):
    first = start(tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for spelling in ("run", "./run/../run", "run/", "link", str(tmp_path / "run")):
        again = start(Path(spelling))
        assert (again.id, again.place, again.copy_of) == (first.id, first.place, ""), spelling


def test_a_moved_folder_is_the_run_and_a_copied_one_is_not(tmp_path):
    first = start(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    shutil.copytree(tmp_path / "copy", tmp_path / "second copy")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert [is_copy(first, tmp_path / name) for name in ("run", "link", "copy", "second copy")] == [
        False,
        False,
        True,
        True,
    ]
    copies = [start(tmp_path / name) for name in ("copy", "second copy")]
    assert len({first.id, *(copy.id for copy in copies)}) == 3
    assert [copy.copy_of for copy in copies] == [first.id] * 2
    assert start(tmp_path / "run").id == first.id, "the original knows nothing of it"
    (tmp_path / "copy").rename(tmp_path / "moved copy")
    moved = start(tmp_path / "moved copy")
    assert (moved.id, moved.copy_of) == (copies[0].id, first.id)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert start(tmp_path / "elsewhere").id == first.id


def test_a_fork_keeps_its_parent_at_each_start_and_in_its_copies(tmp_path):
    parent = Parent(id="a", name="first", place="/runs/first", step=7)
    first = replace(start(tmp_path / "run"), parent=parent)
    (tmp_path / "run" / identity.NAME).write_text(first.to_json())
    assert read(tmp_path / "run") == first
    assert start(tmp_path / "run").parent == parent
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    copy = start(tmp_path / "copy")
    assert (copy.copy_of, copy.parent) == (first.id, parent)


def test_a_copy_whose_original_is_gone_is_the_run(tmp_path):
    """A backup that is put to use; also where another run has the place by now."""
    first = start(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "backup")
    start(tmp_path / "run", new=True)
    assert start(tmp_path / "backup").id == first.id


def test_what_was_brought_back_from_a_second_place_is_the_run_where_its_old_folder_is_seen_too(tmp_path):
    first = start(tmp_path / "run")
    (tmp_path / "new").mkdir()
    text = (tmp_path / "run" / identity.NAME).read_text()
    (tmp_path / "new" / identity.NAME).write_text(without_place(text))
    assert start(tmp_path / "new").id == first.id


def test_starts_are_in_order_whatever_the_clock_says(tmp_path, monkeypatch):
    first = start(tmp_path / "run").attempt
    backup = (tmp_path / "run" / identity.NAME).read_text()
    real = time.time_ns
    for hours in (-1, 5, -24 * 365, 0):
        monkeypatch.setattr(time, "time_ns", lambda hours=hours: real() + hours * 3600 * 10**9)
        second = start(tmp_path / "run").attempt
        assert second >= first + identity.APART, f"{hours} h"
        first = second
    assert first < 1 << 62, "what a metrics server takes"
    (tmp_path / "run" / identity.NAME).write_text(backup)
    monkeypatch.setattr(time, "time_ns", lambda: real() + 6 * 3600 * 10**9)
    assert start(tmp_path / "run").attempt > first, "an older copy of the folder was brought back"


PLAIN = {"id": "a", "attempt": 1, "place": "/", "copy_of": ""}
PARENT = {"id": "b", "name": "first", "place": "/", "step": 9}


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("[1]", id="a list"),
        pytest.param('{"id": "a"}', id="half"),
        pytest.param(json.dumps({"id": "a", "attempt": "1", "place": "/", "copy_of": ""}), id="a text for a number"),
        pytest.param(json.dumps(PLAIN | {"parent": {"id": "b"}}), id="half a parent"),
        pytest.param(json.dumps(PLAIN | {"parent": PARENT | {"step": "9"}}), id="a text for the parent's step"),
        pytest.param(json.dumps({"id": 7, "attempt": 1, "place": "/", "copy_of": ""}), id="a number for a text"),
    ],
)
def test_a_damaged_file_is_refused_with_the_way_out(tmp_path, text):
    (tmp_path / identity.NAME).write_text(text)
    with pytest.raises(RecipeError, match=r"run\.json cannot be read .*: restore it, or delete it; "):
        read(tmp_path)
