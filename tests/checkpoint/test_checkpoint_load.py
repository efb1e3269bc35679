"""Loading: bit by bit what was saved, from the newest checkpoint that is whole, and nothing that does not fit."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import blank, same_bits, save_step, some_tensors
from steptron.checkpoint import manifest as manifests
from steptron.checkpoint.find import find_complete, named, newest_complete, put_aside
from steptron.checkpoint.load import load, load_part
from steptron.checkpoint.manifest import list_checkpoints, read_manifest
from steptron.checkpoint.remote import Remote
from steptron.errors import CheckpointError


def test_a_round_trip_is_bitwise(tmp_path: Path):
    saved = some_tensors() | {"odd": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])}
    path = save_step(tmp_path, 3, saved)
    tensors = blank(saved)
    places = {name: t.data_ptr() for name, t in tensors.items()}
    load(path, tensors)
    for name, t in saved.items():
        assert (tensors[name].dtype, tensors[name].shape) == (t.dtype, t.shape)
        assert tensors[name].flatten().view(torch.uint8).equal(t.flatten().view(torch.uint8)), name
        assert tensors[name].data_ptr() == places[name], "loaded in place"


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "data cut short": ("__0_0.distcp", cut_short, r"step-00000020 is incomplete: __0_0\.distcp has \d+ bytes of \d+"),
    "data flipped": (
        "__0_0.distcp",
        flip_a_byte,
        r"step-00000020 is damaged: checksum mismatch in __0_0\.distcp",
    ),
    "data missing": ("__0_0.distcp", Path.unlink, r"step-00000020 is incomplete: __0_0\.distcp is missing"),
    "metadata flipped": (".metadata", flip_a_byte, r"step-00000020 is damaged: checksum mismatch in \.metadata"),
    "metadata missing": (".metadata", Path.unlink, r"step-00000020 is incomplete: \.metadata is missing"),
    "manifest missing": (
        "manifest.json",
        Path.unlink,
        r"step-00000020 is not a complete checkpoint: it has no manifest",
    ),
    "manifest torn": ("manifest.json", lambda p: p.write_bytes(p.read_bytes()[:99]), "cannot be read"),
    "manifest empty": ("manifest.json", lambda p: p.write_text(""), "cannot be read"),
    "manifest not text": ("manifest.json", lambda p: p.write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "manifest of a later version": ("manifest.json", lambda p: edit(p, version=4), "not a manifest of version 3"),
    "manifest with an unknown key": ("manifest.json", lambda p: edit(p, more=2), "not a manifest of version 3"),
    "manifest is a list": ("manifest.json", lambda p: p.write_text("[]"), "not a manifest of version 3"),
    "manifest with another number": (
        "manifest.json",
        lambda p: edit(p, step=21),
        r"checksum mismatch in manifest\.json",
    ),
    "manifest with a letter flipped": (
        "manifest.json",
        lambda p: p.write_text(p.read_text().replace("by_source", "by_sourge")),
        r"checksum mismatch in manifest\.json",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(tmp_path: Path, damage: str):
    name, act, reason = DAMAGES[damage]
    folder = tmp_path / "checkpoints"
    save_step(folder, 10)
    newest = save_step(folder, 20)
    assert newest_complete(folder) == (newest, [])
    act(newest / name)
    path, skipped = newest_complete(folder)
    assert path == folder / "step-00000010"
    assert len(skipped) == 1
    assert re.search(reason, skipped[0])
    assert "\n" not in skipped[0]
    assert find_complete(tmp_path) == path
    with pytest.raises(CheckpointError, match=reason):
        find_complete(newest)


def test_a_file_that_the_disk_does_not_give_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_step(tmp_path, 10)
    save_step(tmp_path, 20)
    describe = manifests.describe_file

    def bad_sector(path: Path):
        if path.parent.name == "step-00000020":
            raise OSError(5, "Input/output error")
        return describe(path)

    monkeypatch.setattr(manifests, "describe_file", bad_sector)
    path, skipped = newest_complete(tmp_path)
    assert path == tmp_path / "step-00000010"
    assert re.search("step-00000020 cannot be read: .*: Input/output error", skipped[0])


def test_all_damaged(tmp_path: Path):
    for step in (10, 20):
        (save_step(tmp_path / "checkpoints", step) / "manifest.json").unlink()
    path, skipped = newest_complete(tmp_path / "checkpoints")
    assert path is None
    assert [reason.split(" is not")[0][-13:] for reason in skipped] == ["step-00000020", "step-00000010"]
    with pytest.raises(CheckpointError, match=r"has no complete checkpoint; .*step-00000020.*; .*step-00000010"):
        find_complete(tmp_path)


def test_the_newest_before_a_step(tmp_path: Path):
    for step in (10, 20, 30):
        save_step(tmp_path, step)
    file = tmp_path / "step-00000020" / "__0_0.distcp"
    file.write_bytes(bytes([*file.read_bytes()[:-1], 7]))
    path, skipped = newest_complete(tmp_path, before=30)
    assert path == tmp_path / "step-00000010", "the one of 20 has all its bytes, and not its checksum"
    assert "step-00000020" in skipped[0]
    assert newest_complete(tmp_path, before=10) == (None, [])


def test_an_older_one_of_the_mirror_serves_where_all_here_are_damaged(tmp_path: Path):
    """Not a later one, which the run has gone back from."""
    here, there = tmp_path / "here", tmp_path / "there"
    for step in (10, 20, 40):
        save_step(there, step)
    (save_step(here, 30) / "manifest.json").unlink()
    path, skipped = newest_complete(here, remote=Remote(str(there)))
    assert path == here / "step-00000020"
    assert "step-00000030 is not a complete checkpoint" in skipped[0]
    assert skipped[1:] == [f"step-00000020 was restored from {there}"]
    shutil.rmtree(here)
    assert newest_complete(here, remote=Remote(str(there)))[0] == here / "step-00000040", "the run has lost its disk"


def test_temporary_folders_and_strays_are_not_checkpoints(tmp_path: Path):
    path = save_step(tmp_path, 10)
    (tmp_path / ".tmp-step-00000020").mkdir()
    (tmp_path / "notes.txt").touch()
    assert list_checkpoints(tmp_path) == [path]
    assert newest_complete(tmp_path) == (path, [])


def test_where_there_is_nothing(tmp_path: Path):
    assert newest_complete(tmp_path / "none") == (None, [])
    with pytest.raises(CheckpointError, match="no such folder"):
        find_complete(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"has no manifest\.json"):
        find_complete(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="has no complete checkpoint"):
        find_complete(tmp_path)


def test_find_whole_takes_a_run_or_one_of_its_checkpoints(tmp_path: Path):
    first, second = save_step(tmp_path / "checkpoints", 10), save_step(tmp_path / "checkpoints", 20)
    assert find_complete(tmp_path) == second
    assert find_complete(first) == first
    assert read_manifest(first).step == 10


def test_a_manifest_from_before_origins_is_read(tmp_path: Path):
    path = save_step(tmp_path / "checkpoints", 10) / "manifest.json"
    values = json.loads(path.read_text())
    assert set(values.pop("origin")) >= {"commit", "command", "host", "torch"}
    del values["blake2b"]
    path.write_text(json.dumps(values | {"blake2b": manifests._digest(values)}))
    manifest = read_manifest(path.parent)
    assert (manifest.step, manifest.origin) == (10, {})


MISFITS = {
    "missing there": (lambda t: t | {"new": torch.zeros(2)}, "step-00000010 lacks new"),
    "missing here": (
        lambda t: {k: v for k, v in t.items() if k != "model.norm"},
        "step-00000010 has, and the model does not, model.norm",
    ),
    "another shape": (
        lambda t: t | {"model.matrix": torch.zeros(7, 5)},
        r"step-00000010: model.matrix is \(5, 7\) there and \(7, 5\) in the model",
    ),
    "another number of dims": (
        lambda t: t | {"optimizer.step": torch.zeros(1)},
        r"step-00000010: optimizer.step is \(\) there and \(1,\) in the model",
    ),
    "many missing": (
        lambda t: t | {f"new {i}": torch.zeros(2) for i in range(5)},
        "step-00000010 lacks new 0, new 1, new 2 and 2 more",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_names_and_shapes_must_be_the_same(tmp_path: Path, misfit: str):
    change, message = MISFITS[misfit]
    path = save_step(tmp_path, 10)
    tensors = change(blank(some_tensors()))
    with pytest.raises(CheckpointError, match=message):
        load(path, tensors)
    assert not any(t.any() for t in tensors.values()), "nothing is loaded of what does not fit"


def test_a_part_is_loaded_and_rounded(tmp_path: Path):
    saved = some_tensors(10)
    path = save_step(tmp_path, 10, saved)
    part = {"model.matrix": torch.zeros(5, 7, dtype=torch.bfloat16), "model.experts": torch.zeros(3, 4, 2)}
    load_part(path, part)
    assert same_bits(part["model.matrix"], saved["model.matrix"].bfloat16())
    assert same_bits(part["model.experts"], saved["model.experts"].float())


@pytest.mark.parametrize("misfit", ["missing there", "another shape", "many missing"])
def test_a_part_must_fit_too(tmp_path: Path, misfit: str):
    change, message = MISFITS[misfit]
    path = save_step(tmp_path, 10)
    with pytest.raises(CheckpointError, match=message):
        load_part(path, change(blank(some_tensors())))


def test_data_that_goes_while_it_is_read(tmp_path: Path):
    """After the checks: the error is a checkpoint's, not a traceback."""
    path = save_step(tmp_path, 10)
    (path / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000010 cannot be read: .*No such file") as caught:
        load(path, blank(some_tensors()))
    assert "\n" not in str(caught.value)


class _Bad:
    """A pickle of it runs a command."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_no_code_of_a_checkpoint_is_run(tmp_path: Path):
    path = save_step(tmp_path, 10)
    (path / ".metadata").write_bytes(pickle.dumps(_Bad(tmp_path / "mark")))
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read: it names posix\.system"):
        load(path, blank(some_tensors()))
    assert not (tmp_path / "mark").exists()


def test_a_step_by_number(tmp_path: Path):
    paths = {step: save_step(tmp_path, step) for step in (10, 20, 30, 40, 50)}
    assert named(tmp_path, 20) == paths[20]
    with pytest.raises(CheckpointError, match=r"--step 33: .* no checkpoint of that step; nearest: 20, 30, 40$"):
        named(tmp_path, 33)
    with pytest.raises(CheckpointError, match="there is none at all"):
        named(tmp_path / "none", 33)


def test_later_ones_are_put_aside(tmp_path: Path):
    for step in (10, 20, 30):
        save_step(tmp_path, step)
    put_aside(tmp_path, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "abandoned-step-00000020",
        "abandoned-step-00000030",
        "step-00000010",
    ]
    assert newest_complete(tmp_path) == (tmp_path / "step-00000010", [])
