"""Saving in the background: what is written is what the tensors were, failures are told, and the second place has whole copies."""

import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoints import blank, same_bits, some_tensors
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from steptron.checkpoint import place as places
from steptron.checkpoint import save as saving
from steptron.checkpoint.find import newest_whole, verify
from steptron.checkpoint.keep import Keep
from steptron.checkpoint.load import load
from steptron.checkpoint.manifest import list_checkpoints, read_manifest
from steptron.checkpoint.place import Place, fetch
from steptron.checkpoint.saver import Saved, Saver
from steptron.checkpoint.team import ALONE, Team
from steptron.errors import CheckpointError, SaveError
from steptron.train import build

LAYOUT = {"counters": {"tokens": 7}, "recipe_hash": "abc", "layout": {"world_size": 1}}


def saver(folder: Path, place: Path | str | None = None, newest: int = 9, team: Team = ALONE, background: bool = True):
    return Saver(folder, Keep(newest=newest), Place(str(place)) if place else None, team, background)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def nothing() -> None:
    pass


def test_what_is_written_is_what_the_tensors_were(tmp_path: Path):
    """The writer is held up while training changes the tensors, and goes on only then."""
    tensors, go = some_tensors(), threading.Event()
    saved = {name: t.clone() for name, t in tensors.items()}
    saver_ = saver(tmp_path)
    saver_.save(10, lambda: tensors, before=go.wait, **LAYOUT)
    assert saver_.took() == []
    assert names(tmp_path) == []
    for t in tensors.values():
        t.add_(1)
    go.set()
    saver_.wait()
    [done] = saver_.took()
    assert (done.event, done.step, done.evidence["path"]) == ("checkpoint", 10, "step-00000010")
    assert done.evidence["bytes"] == sum(t.nbytes for t in saved.values())
    loaded = blank(saved)
    load(tmp_path / "step-00000010", loaded)
    assert all(same_bits(loaded[name], saved[name]) for name in saved)
    saver_.close(5)


@pytest.mark.parametrize("background", [True, False])
def test_gathering_the_state_holds_training_up_too(tmp_path: Path, background: bool):
    def gathered() -> dict[str, torch.Tensor]:
        time.sleep(0.5)
        return some_tensors()

    saver_ = saver(tmp_path, background=background)
    saver_.save(10, gathered, before=nothing, **LAYOUT)
    saver_.wait()
    [done] = saver_.took()
    assert done.evidence["stall_s"] >= 0.5
    saver_.close(5)


def test_the_next_one_waits_for_the_one_before(tmp_path: Path):
    saver_, order = saver(tmp_path), []
    saver_.save(10, some_tensors, before=lambda: (time.sleep(0.5), order.append("written")), **LAYOUT)  # pyright: ignore[reportArgumentType]
    order.append("trained")
    saver_.save(20, some_tensors, before=nothing, **LAYOUT)
    order.append("saved again")
    saver_.wait()
    assert order == ["trained", "written", "saved again"]
    assert names(tmp_path) == ["step-00000010", "step-00000020"]


@pytest.mark.parametrize("background", [True, False])
def test_a_failure_is_told_once_training_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool):
    def full(*_args) -> None:
        raise OSError(28, "No space left on device")

    saver_ = saver(tmp_path, background=background)
    saver_.save(10, some_tensors, before=nothing, **LAYOUT)
    saver_.wait()
    monkeypatch.setattr(saving, "write_manifest", full)
    if background:
        saver_.save(20, some_tensors, before=nothing, **LAYOUT)
        while not saver_.failed:
            time.sleep(0.01)
    for ask in (lambda: saver_.save(30, some_tensors, before=nothing, **LAYOUT), saver_.wait):
        with pytest.raises(SaveError, match=r"step \d0 cannot be written .*No space left on device"):
            ask()
    assert names(tmp_path) == ["step-00000010"]


def test_the_second_place_has_whole_copies_and_keeps_the_same(tmp_path: Path):
    here, there = tmp_path / "here", tmp_path / "there"
    saver_ = saver(here, there, newest=2)
    for step in (10, 20, 30):
        saver_.save(step, partial(some_tensors, step), before=nothing, **LAYOUT)
    saver_.wait()
    assert names(there) == names(here) == ["step-00000020", "step-00000030"]
    verify(there / "step-00000030", ALONE)
    assert [saved.evidence.get("steps") for saved in saver_.took() if saved.event == "checkpoint_copied"] == [
        [10],
        [20],
        [30],
    ]
    fetched = fetch(Place(str(there)), 30, tmp_path / "elsewhere", ALONE)
    tensors = blank(some_tensors())
    load(fetched, tensors)
    assert all(same_bits(tensors[name], t) for name, t in some_tensors(30).items())


def test_a_place_that_does_not_answer_is_tried_again(tmp_path: Path):
    here, there = tmp_path / "here", tmp_path / "there"
    there.write_text("a file where the folder should be")
    saver_ = saver(here, there)
    saver_.save(10, lambda: some_tensors(10), before=nothing, **LAYOUT)
    saver_.wait()
    written, failed = saver_.took()
    assert (written.event, failed.event, failed.step) == ("checkpoint", "copy_failed", 10)
    assert f"checkpoint.copy_to={there}" in failed.evidence["reason"]
    there.unlink()
    saver_.save(20, lambda: some_tensors(20), before=nothing, **LAYOUT)
    saver_.wait()
    assert saver_.took()[-1].evidence["steps"] == [20, 10], "the newest first, and then what was missing"
    assert names(there) == names(here)


def test_a_copy_cut_short_is_not_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The place loses bytes: there is no manifest, and so no checkpoint, there."""
    here, there, push = tmp_path / "here", tmp_path / "there", Place.push

    def lossy(self: Place, folder: Path, names) -> None:
        push(self, folder, names)
        file = there / folder.name / "__0_0.distcp"
        file.write_bytes(file.read_bytes()[:-1])

    monkeypatch.setattr(places.Place, "push", lossy)
    saver_ = saver(here, there)
    saver_.save(10, lambda: some_tensors(10), before=nothing, **LAYOUT)
    saver_.wait()
    assert "bytes there" in saver_.took()[-1].evidence["reason"]
    assert Place(str(there)).steps() == []
    with pytest.raises(CheckpointError, match=r"checkpoint\.copy_to=.*manifest"):
        fetch(Place(str(there)), 10, tmp_path / "elsewhere", ALONE)


def test_what_the_run_went_back_from_is_removed_there(tmp_path: Path):
    here, there = tmp_path / "here", tmp_path / "there"
    first = saver(here, there)
    for step in (10, 20, 30):
        first.save(step, partial(some_tensors, step), before=nothing, **LAYOUT)
    first.wait()
    (here / "step-00000030").rename(here / "abandoned-step-00000030")
    (here / "step-00000020").rename(here / "abandoned-step-00000020")
    again = saver(here, there)
    again.save(15, lambda: some_tensors(15), before=nothing, **LAYOUT)
    again.wait()
    assert names(there) == ["step-00000010", "step-00000015"]


def on_a_rank(rank: int, folder: Path) -> dict:
    """Two ranks save in the background, in a group of their own, while they go on with collectives of their own."""
    mesh = init_device_mesh("cpu", (2,))
    team = build.team(dist.new_group(backend="gloo"))
    saver_ = saver(folder / "here", folder / "there", team=team)
    tensors = {"w": distribute_tensor(torch.arange(14.0).view(7, 2), mesh, [Shard(0)])}
    saver_.save(10, lambda: tensors, before=nothing, **LAYOUT)
    for _ in range(200):
        tensors["w"].to_local().add_(1)
        dist.all_reduce(torch.ones(100))
    saver_.wait()
    events: list[Saved] = saver_.took()

    whole = newest_whole(folder / "here")[0]
    assert whole is not None
    shares = [team.share(sorted(read_manifest(whole).files))]
    dist.barrier()
    if rank == 0:
        (whole / "__1_0.distcp").write_bytes(b"x" * (whole / "__1_0.distcp").stat().st_size)
    dist.barrier()
    error = ""
    try:
        verify(whole, replace(team, group=None))
    except CheckpointError as caught:
        error = str(caught)
    return {"events": [saved.event for saved in events], "share": shares[0], "error": error}


def test_two_ranks_save_while_they_train(tmp_path: Path):
    results = run_ranks(2, on_a_rank, tmp_path, tmp_path)
    assert [result["events"] for result in results] == [["checkpoint", "checkpoint_copied"]] * 2
    assert sorted(results[0]["share"] + results[1]["share"]) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    assert all("__1_0.distcp does not have its checksum" in result["error"] for result in results)
    [copy] = list_checkpoints(tmp_path / "there")
    loaded = {"w": torch.zeros(7, 2)}
    load(copy, loaded)
    assert torch.equal(loaded["w"], torch.arange(14.0).view(7, 2))
