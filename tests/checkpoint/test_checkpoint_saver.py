"""Saving in the background: what is written is what the tensors were, failures are told, and the mirror has whole
copies."""

import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoints import blank, same_bits, save_step, some_tensors
from steptron.checkpoint import mirror as copiers
from steptron.checkpoint import remote as places
from steptron.checkpoint import save as saving
from steptron.checkpoint.coordinator import ALONE, Coordinator
from steptron.checkpoint.find import newest_complete, put_aside, verify
from steptron.checkpoint.load import load
from steptron.checkpoint.manifest import FileEntry, list_checkpoints, read_manifest, step_name, write_manifest
from steptron.checkpoint.mirror import Mirror, Saved
from steptron.checkpoint.remote import Remote, fetch
from steptron.checkpoint.retention import Retention
from steptron.checkpoint.saver import Saver
from steptron.errors import CheckpointError, SaveError
from steptron.train.process_group import make_coordinator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ranks import run_ranks
from waiting import PATIENCE_S, wait_until

LAYOUT = {"counters": {"tokens": 7}, "recipe_hash": "abc", "layout": {"world_size": 1}}


def saver(
    folder: Path,
    there: Path | None = None,
    newest: int = 9,
    coordinators: tuple[Coordinator, Coordinator] = (ALONE, ALONE),
    background: bool = True,
    since: int = 0,
):
    keep = Retention(newest=newest)
    copier = Mirror(folder, Remote(str(there)), keep, coordinators[1], since) if there else None
    return Saver(folder, replace(keep, in_use=copier.copying) if copier else keep, coordinators[0], copier, background)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def nothing() -> None:
    pass


def told(saver_: Saver, number: int) -> list[Saved]:
    """What has ended, once it is so many."""
    found: list[Saved] = []

    def enough() -> bool:
        found.extend(saver_.took())
        return len(found) >= number

    wait_until(enough, f"{number} events")
    return found


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
    saver_, order, trained = saver(tmp_path), [], threading.Event()

    def write_late() -> None:
        trained.wait(PATIENCE_S)
        time.sleep(0.5)  # in which the next save could come too early
        order.append("written")

    saver_.save(10, some_tensors, before=write_late, **LAYOUT)
    order.append("trained")
    trained.set()
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
        wait_until(lambda: saver_.failed, "the failure")
    for ask in (lambda: saver_.save(30, some_tensors, before=nothing, **LAYOUT), saver_.wait):
        with pytest.raises(SaveError, match=r"step \d0 cannot be written .*No space left on device"):
            ask()
    assert names(tmp_path) == ["step-00000010"]


def test_the_mirror_has_whole_copies_and_keeps_the_same(tmp_path: Path):
    here, there = tmp_path / "here", tmp_path / "there"
    saver_, done = saver(here, there, newest=2), []
    for step in (10, 20, 30):
        saver_.save(step, partial(some_tensors, step), before=nothing, **LAYOUT)
        done += told(saver_, 2)
    assert names(there) == names(here) == ["step-00000020", "step-00000030"]
    verify(there / "step-00000030", ALONE)
    assert [saved.evidence.get("steps") for saved in done if saved.event == "checkpoint_copied"] == [
        [10],
        [20],
        [30],
    ]
    fetched = fetch(Remote(str(there)), 30, tmp_path / "elsewhere", ALONE)
    tensors = blank(some_tensors())
    load(fetched, tensors)
    assert all(same_bits(tensors[name], t) for name, t in some_tensors(30).items())


def test_a_place_that_does_not_answer_is_tried_again(tmp_path: Path):
    here, there = tmp_path / "here", tmp_path / "there"
    there.write_text("a file where the folder should be")
    saver_ = saver(here, there)
    saver_.save(10, lambda: some_tensors(10), before=nothing, **LAYOUT)
    written, failed = told(saver_, 2)
    assert (written.event, failed.event, failed.step) == ("checkpoint", "copy_failed", 10)
    assert f"checkpoint.mirror_to={there}" in failed.evidence["reason"]
    there.unlink()
    saver_.save(20, lambda: some_tensors(20), before=nothing, **LAYOUT)
    assert told(saver_, 2)[-1].evidence["steps"] == [20, 10], "the newest first, and then what was missing"
    assert names(there) == names(here)


def test_a_copy_cut_short_is_not_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The place loses bytes: there is no manifest, and so no checkpoint, there."""
    here, there, push = tmp_path / "here", tmp_path / "there", Remote.push

    def lossy(self: Remote, folder: Path, names) -> None:
        push(self, folder, names)
        file = there / folder.name / "__0_0.distcp"
        file.write_bytes(file.read_bytes()[:-1])

    monkeypatch.setattr(places.Remote, "push", lossy)
    saver_ = saver(here, there)
    saver_.save(10, lambda: some_tensors(10), before=nothing, **LAYOUT)
    assert "bytes there" in told(saver_, 2)[-1].evidence["reason"]
    assert Remote(str(there)).steps() == []
    with pytest.raises(CheckpointError, match=r"checkpoint\.mirror_to=.*manifest"):
        fetch(Remote(str(there)), 10, tmp_path / "elsewhere", ALONE)


def test_what_the_run_went_back_from_is_removed_there(tmp_path: Path):
    here, there = tmp_path / "here", tmp_path / "there"
    first = saver(here, there)
    for step in (10, 20, 30):
        first.save(step, partial(some_tensors, step), before=nothing, **LAYOUT)
    told(first, 6)
    (here / "step-00000030").rename(here / "abandoned-step-00000030")
    (here / "step-00000020").rename(here / "abandoned-step-00000020")
    again = saver(here, there, since=10)
    again.save(15, lambda: some_tensors(15), before=nothing, **LAYOUT)
    told(again, 2)
    assert names(there) == ["step-00000010", "step-00000015"]


@pytest.mark.parametrize("restarted", [True, False])
def test_a_step_that_is_written_again_is_copied_again(tmp_path: Path, restarted: bool):
    """After going back, the step of an old copy is reached once more, past one that is not."""
    here, there = tmp_path / "here", tmp_path / "there"
    saver_ = saver(here, there)
    for step in (10, 20, 30):
        saver_.save(step, partial(some_tensors, step), before=nothing, **LAYOUT)
    told(saver_, 6)
    put_aside(here, 10)
    if restarted:
        saver_ = saver(here, there, since=10)
    else:
        saver_.went_back(10)
    saver_.save(30, lambda: some_tensors(33), before=nothing, **LAYOUT)
    told(saver_, 2)
    assert names(there) == ["step-00000010", "step-00000030"]
    tensors = blank(some_tensors())
    load(there / "step-00000030", tensors)
    assert all(same_bits(tensors[name], t) for name, t in some_tensors(33).items())


def test_a_place_that_hangs_holds_up_neither_training_nor_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each checkpoint is what the tensors were, and the one that is being copied is not removed meanwhile."""
    here, there, push, go = tmp_path / "here", tmp_path / "there", Remote.push, threading.Event()

    def slow(self: Remote, folder: Path, files) -> None:
        assert go.wait(PATIENCE_S)
        push(self, folder, files)

    monkeypatch.setattr(places.Remote, "push", slow)
    saver_ = saver(here, there, newest=2)
    for step in (10, 20, 30, 40):
        saver_.save(step, partial(some_tensors, step), before=lambda: time.sleep(0.2), **LAYOUT)
    saver_.wait()
    assert [done.event for done in saver_.took()] == ["checkpoint"] * 4
    assert names(here) == ["step-00000010", "step-00000030", "step-00000040"], "10 is being copied"
    for step in (30, 40):
        tensors = blank(some_tensors())
        load(here / step_name(step), tensors)
        assert all(same_bits(tensors[name], t) for name, t in some_tensors(step).items())
    go.set()
    assert [done.event for done in told(saver_, 4)] == ["checkpoint_copied"] * 4
    assert names(there) == ["step-00000030", "step-00000040"]


def test_ranks_out_of_step_end_the_copying_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_args) -> list[int]:
        raise RuntimeError("Timed out waiting 3600000ms for recv operation to complete")

    saver_ = saver(tmp_path / "here", tmp_path / "there")
    monkeypatch.setattr(copiers, "mirror", broken)
    saver_.save(10, some_tensors, before=nothing, **LAYOUT)
    assert [done.event for done in told(saver_, 2)] == ["checkpoint", "copy_failed"]
    saver_.save(20, some_tensors, before=nothing, **LAYOUT)
    saver_.wait()
    assert [done.event for done in told(saver_, 1)] == ["checkpoint"]
    saver_.close(5)


def test_a_copy_that_names_files_elsewhere_is_refused(tmp_path: Path):
    """Who can write to the place must not write to the user's files."""
    copy = save_step(tmp_path / "there", 10)
    manifest = read_manifest(copy)
    write_manifest(replace(manifest, files=manifest.files | {"../../owned": FileEntry(bytes=3, blake2b="0")}), copy)
    (tmp_path / "owned").write_text("bad")
    with pytest.raises(CheckpointError, match=r"names files that are not in its folder: '\.\./\.\./owned'"):
        fetch(Remote(str(tmp_path / "there")), 10, tmp_path / "a" / "b", ALONE)
    assert not (tmp_path / "a" / "owned").exists()


def test_recipe_and_ledger_lie_beside_the_copies(tmp_path: Path):
    run, there = tmp_path / "run", tmp_path / "there"
    saver_ = saver(run / "checkpoints", there)
    (run / "checkpoints").mkdir(parents=True)
    for name in ("recipe.yaml", "ledger.jsonl"):
        (run / name).write_text(name)
    saver_.save(10, some_tensors, before=nothing, **LAYOUT)
    told(saver_, 2)
    Remote(str(there)).bring_records(tmp_path / "new" / "run")
    assert names(tmp_path / "new" / "run") == ["ledger.jsonl", "recipe.yaml"]
    assert (tmp_path / "new" / "run" / "ledger.jsonl").read_text() == "ledger.jsonl"
    with pytest.raises(CheckpointError, match=r"elsewhere: there is no recipe\.yaml; give the folder"):
        Remote(str(tmp_path / "elsewhere")).bring_records(tmp_path / "another")
    assert not (tmp_path / "another").exists()


def on_a_rank(rank: int, folder: Path) -> dict:
    """Two ranks save in the background, in a group of their own, while they go on with collectives of their own."""
    mesh = init_device_mesh("cpu", (2,))
    coordinator, other = (make_coordinator(dist.new_group(backend="gloo")) for _ in range(2))
    saver_ = saver(folder / "here", folder / "there", coordinators=(coordinator, other))
    tensors = {"w": distribute_tensor(torch.arange(14.0).view(7, 2), mesh, [Shard(0)])}
    saver_.save(10, lambda: tensors, before=nothing, **LAYOUT)
    for _ in range(200):
        tensors["w"].to_local().add_(1)
        dist.all_reduce(torch.ones(100))
    events = told(saver_, 2)

    whole = newest_complete(folder / "here")[0]
    assert whole is not None
    shares = [coordinator.share(sorted(read_manifest(whole).files))]
    dist.barrier()
    if rank == 0:
        (whole / "__1_0.distcp").write_bytes(b"x" * (whole / "__1_0.distcp").stat().st_size)
    dist.barrier()
    error = ""
    try:
        verify(whole, replace(coordinator, group=None))
    except CheckpointError as caught:
        error = str(caught)
    return {"events": [saved.event for saved in events], "share": shares[0], "error": error}


def test_two_ranks_save_while_they_train(tmp_path: Path):
    results = run_ranks(2, on_a_rank, tmp_path, tmp_path)
    assert [result["events"] for result in results] == [["checkpoint", "checkpoint_copied"]] * 2
    assert sorted(results[0]["share"] + results[1]["share"]) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    assert all("checksum mismatch in __1_0.distcp" in result["error"] for result in results)
    [copy] = list_checkpoints(tmp_path / "there")
    loaded = {"w": torch.zeros(7, 2)}
    load(copy, loaded)
    assert torch.equal(loaded["w"], torch.arange(14.0).view(7, 2))
