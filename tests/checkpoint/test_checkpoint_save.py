"""Saving: a complete checkpoint stays complete through kills, full disks and errors on one rank. An old one is removed
only after the new one is complete."""

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import steptron
import torch
import torch.distributed as dist
from checkpoints import blank, same_bits, save_step, some_tensors
from steptron.checkpoint import save as saving
from steptron.checkpoint.find import newest_complete
from steptron.checkpoint.load import load
from steptron.checkpoint.manifest import list_checkpoints, read_manifest
from steptron.errors import CheckpointError, SaveError
from steptron.train.process_group import make_coordinator
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from disk_calls import recorded
from ranks import run_ranks
from waiting import wait_until


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def raising(error: Exception):
    def action(*_args, **_kwargs):
        raise error

    return action


def test_a_checkpoint_is_a_folder_with_a_manifest_of_its_files(tmp_path: Path):
    path = save_step(tmp_path / "checkpoints", 12)
    assert path == tmp_path / "checkpoints" / "step-00000012"
    assert names(path.parent) == ["step-00000012"]
    manifest = read_manifest(path)
    assert set(manifest.files) == set(names(path)) - {"manifest.json"}
    assert {name: entry.bytes for name, entry in manifest.files.items()} == {
        name: (path / name).stat().st_size for name in manifest.files
    }
    assert (manifest.step, manifest.recipe_hash, manifest.layout) == (12, "abc", {"world_size": 1})
    assert manifest.counters == {"tokens": 1200, "by_source": {"prose": 0.5}}
    assert (manifest.torch, manifest.steptron) == (torch.__version__, steptron.__version__)


def test_everything_is_on_the_disk_before_the_rename_and_the_rename_after_it(tmp_path: Path):
    """A machine that loses its power at any moment has the checkpoint complete, or not at all."""
    with recorded() as calls:
        path = save_step(tmp_path, 10)
    assert calls.unsynced[path] == [], "not on the disk when the folder was renamed"
    assert calls.order[-2:] == [("rename", path), ("sync", tmp_path)], "the new name is in the parent's list of files"


def test_only_the_newest_are_kept(tmp_path: Path):
    for step in range(1, 6):
        save_step(tmp_path, step * 10, keep=2)
    assert names(tmp_path) == ["step-00000040", "step-00000050"]
    save_step(tmp_path, 60, keep=1)
    assert names(tmp_path) == ["step-00000060"]


def test_old_ones_go_only_after_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_step(tmp_path, 10)
    seen = []
    remove = saving.shutil.rmtree

    def look(path, **options):
        seen.append((Path(path), newest_complete(tmp_path)[0]))
        remove(path, **options)

    monkeypatch.setattr(saving.shutil, "rmtree", look)
    save_step(tmp_path, 20, keep=1)
    assert seen == [(tmp_path / "step-00000010", tmp_path / "step-00000020")]


def test_a_damaged_later_one_does_not_push_out_the_new_one(tmp_path: Path):
    """Step 30 was cut short, the run went on from 10 and saves 20: that one has to stay, and is what resuming finds."""
    save_step(tmp_path, 10)
    (save_step(tmp_path, 30) / "manifest.json").unlink()
    save_step(tmp_path, 20, keep=1)
    assert names(tmp_path) == ["step-00000020", "step-00000030"]
    assert newest_complete(tmp_path)[0] == tmp_path / "step-00000020"
    save_step(tmp_path, 30, keep=1)
    assert newest_complete(tmp_path) == (tmp_path / "step-00000030", [])


def test_one_cut_short_does_not_count_as_kept(tmp_path: Path):
    save_step(tmp_path, 10)
    cut = next(save_step(tmp_path, 20).glob("*.distcp"))
    cut.write_bytes(cut.read_bytes()[:-1])
    save_step(tmp_path, 30, keep=2)
    assert names(tmp_path) == ["step-00000010", "step-00000020", "step-00000030"]
    save_step(tmp_path, 40, keep=2)
    assert names(tmp_path) == ["step-00000030", "step-00000040"]


def test_the_same_step_is_written_anew(tmp_path: Path):
    save_step(tmp_path, 10, some_tensors(1))
    path = save_step(tmp_path, 10, some_tensors(2))
    tensors = blank(some_tensors())
    load(path, tensors)
    assert all(same_bits(tensors[name], t) for name, t in some_tensors(2).items())


KILLED = """
import sys, time
from pathlib import Path
from checkpoints import save_step
from steptron.checkpoint import save as saving

folder = Path(sys.argv[1])

def linger(*_):
    (folder / "reached").touch()
    time.sleep(10_000)  # until it is killed

setattr(saving, sys.argv[2], linger)
save_step(folder, 20, keep=1)
"""


def test_killed_while_saving_leaves_the_one_before(tmp_path: Path):
    """Once between the tensors and their checksums, once between these and the manifest."""
    places = ["describe_file", "write_manifest"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    for place in places:
        save_step(tmp_path / place, 10)
    workers = {
        place: subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / place), place], env=environment)
        for place in places
    }
    for place, worker in workers.items():
        folder = tmp_path / place
        wait_until((folder / "reached").exists, "the place where it is killed", [worker])
        worker.send_signal(signal.SIGKILL)
        assert worker.wait() == -signal.SIGKILL
        (folder / "reached").unlink()
        assert names(folder) == [".tmp-step-00000020", "step-00000010"]
        assert newest_complete(folder) == (folder / "step-00000010", [])
        save_step(folder, 30)
        assert names(folder) == ["step-00000010", "step-00000030"], "the next save clears what was left"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs takes root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(small_disk: Path):
    def tensors(megabytes: float) -> dict[str, torch.Tensor]:
        return {"w": torch.ones(int(megabytes * (1 << 18)))}

    folder = small_disk / "checkpoints"
    save_step(folder, 10, tensors(1.5))
    with pytest.raises(SaveError, match=r"step 20.*No space left on device") as caught:
        save_step(folder, 20, tensors(8), keep=1)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    assert names(folder) == ["step-00000010"]
    assert newest_complete(folder) == (folder / "step-00000010", [])
    save_step(folder, 30, tensors(1.5), keep=1)
    assert names(folder) == ["step-00000030"], "with room again, saving goes on"


@pytest.mark.parametrize("place", ["_prepare", "describe_file", "write_manifest", "sync_tree", "rename_durably"])
def test_an_error_at_any_place_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str):
    save_step(tmp_path, 10)
    with monkeypatch.context() as patch:
        patch.setattr(saving, place, raising(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(SaveError, match="Input/output error"):
            save_step(tmp_path, 20, keep=1)
    assert names(tmp_path) == ["step-00000010"]
    assert newest_complete(tmp_path)[0] == tmp_path / "step-00000010"


@pytest.mark.parametrize(
    ("free", "reason"), [(0, "No space left on device"), (1 << 40, "unexpected pos 704")], ids=["full", "not full"]
)
def test_an_error_that_has_lost_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, reason: str):
    """As one arrives from another rank: torch's complaint about its file, without the system's reason for it."""
    usage = saving.shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda _path: usage)
    monkeypatch.setattr(FileSystemWriter, "write_data", raising(RuntimeError("unexpected pos 704\nmore")))
    with pytest.raises(SaveError, match=reason) as caught:
        save_step(tmp_path, 10)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match="Not a directory"):
        save_step(tmp_path / "file" / "checkpoints", 10)


# On two ranks: sharded tensors both ways, and an error that only one of them meets.


def sharded(tensors: dict[str, torch.Tensor], mesh) -> dict[str, torch.Tensor]:
    """What has dims is sharded by rows or replicated; the rest, and the counts, are plain tensors."""
    return {
        name: t
        if t.ndim == 0 or name == "counts"
        else distribute_tensor(t, mesh, [Replicate() if name == "model.norm" else Shard(0)])
        for name, t in tensors.items()
    }


def failure(action) -> str:
    try:
        action()
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def fails_on_rank_1(folder: Path, owner, name: str) -> str:
    """The error that this rank sees when `owner.name` fails on rank 1."""
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(owner, name, raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        return failure(lambda: save_step(folder, 20, keep=1, coordinator=make_coordinator()))


def on_a_rank(rank: int, folder: Path, from_one: Path) -> dict:
    mesh = init_device_mesh("cpu", (2,))
    loaded = sharded(blank(some_tensors()), mesh)
    load(from_one, loaded)
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in loaded.items()}
    result: dict = {"loaded": all(same_bits(whole[name], t) for name, t in some_tensors(1).items())}
    lacking = {name: t for name, t in loaded.items() if name != "model.matrix"}
    result["missing name"] = failure(lambda: load(from_one, lacking))

    with recorded() as calls:
        path = save_step(folder, 10, sharded(some_tensors(10), mesh), coordinator=make_coordinator())
    shard = path / f"__{rank}_0.distcp"
    synced = next((seen for written, seen in calls.synced.items() if written.name == shard.name), None)
    result["shard synced here"] = synced == (shard.stat().st_size, shard.stat().st_mtime_ns)
    result["unsynced"] = calls.unsynced.get(path)
    result["write"] = fails_on_rank_1(folder, FileSystemWriter, "write_data")
    result["checksum"] = fails_on_rank_1(folder, saving, "describe_file")
    dist.barrier()
    result["left"] = names(folder)
    return result


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("two")
    from_one = save_step(folder / "one", 1)
    return folder / "two", run_ranks(2, on_a_rank, folder, folder / "two", from_one)


def test_saved_by_one_loads_on_two(two_ranks: tuple[Path, list[dict]]):
    assert [result["loaded"] for result in two_ranks[1]] == [True, True]


def test_saved_by_two_loads_on_one(two_ranks: tuple[Path, list[dict]]):
    path, reasons = newest_complete(two_ranks[0])
    assert reasons == []
    assert path is not None
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata"} == set(read_manifest(path).files)
    tensors = blank(some_tensors())
    load(path, tensors)
    for name, expected in some_tensors(10).items():
        assert same_bits(tensors[name], expected), name


def test_each_rank_syncs_its_own_shard(two_ranks: tuple[Path, list[dict]]):
    """Rank 0 cannot do it for a rank on another machine, whose cache still has the bytes."""
    assert [result["shard synced here"] for result in two_ranks[1]] == [True, True]
    assert [result["unsynced"] for result in two_ranks[1]] == [[], None], "rank 0 alone renames, once all is there"


@pytest.mark.parametrize("place", ["write", "checksum"])
def test_an_error_on_one_rank_is_raised_on_both(two_ranks: tuple[Path, list[dict]], place: str):
    folder, results = two_ranks
    for result in results:
        assert re.match("SaveError: .*No space left on device", result[place])
        assert result["left"] == ["step-00000010"]
    assert list_checkpoints(folder) == [folder / "step-00000010"]


def test_names_that_differ_are_an_error_on_both_ranks(two_ranks: tuple[Path, list[dict]]):
    for result in two_ranks[1]:
        assert result["missing name"].endswith("step-00000001 has, and the model does not, model.matrix")
