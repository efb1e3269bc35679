"""The mirror: a copy of a run's checkpoints on any file system that fsspec knows (`s3://…`, `gs://…`, a folder).

    checkpoints/step-N, complete ─ mirror: every rank a share of the files, manifest.json last ─► PLACE/step-N
    PLACE/step-N, if the run folder has nothing newer ─ fetch ─► checkpoints/step-N

A folder there without a manifest is incomplete, as here. A copy that failed is tried again after the next save. The
run's recipe and ledger lie beside the steps, so that a run can continue from there when its own disk is lost.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from steptron.atomic import atomic_write, make_folder, rename_durably, sync_tree
from steptron.checkpoint.coordinator import Coordinator
from steptron.checkpoint.manifest import NAME, has_all_bytes, list_checkpoints, read_manifest, step_name, step_of
from steptron.checkpoint.retention import Retention
from steptron.config import identity
from steptron.errors import CheckpointError

Result = TypeVar("Result")

RECORDS = ("ledger.jsonl", identity.NAME, "recipe.yaml")
"""The files of the run's folder that are copied. The recipe is copied last: if it is there, all are."""


class Remote:
    """A mirror at `url`, where step folders are kept. Every method raises `CheckpointError` if the file system fails
    or does not answer."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")

    def steps(self, complete: bool = True) -> list[int]:
        """Return the steps of checkpoints in the mirror, newest first. With `complete`, leave out copies that were cut
        short."""

        def look() -> list[int]:
            fs, root = self._open()
            if not fs.exists(root):
                return []
            found = [path for name in fs.ls(root, detail=False) if step_of(path := Path(name)) >= 0]
            return sorted(
                (step_of(p) for p in found if not complete or fs.exists(f"{root}/{p.name}/{NAME}")), reverse=True
            )

        return self._answer(look)

    def owner(self) -> str:
        """Return the id of the run whose checkpoints these are, or an empty text if none is written down."""

        def look() -> str:
            fs, root = self._open()
            path = f"{root}/{identity.NAME}"
            return json.loads(fs.cat_file(path))["id"] if fs.exists(path) else ""

        return self._answer(look)

    def clear(self, step: int) -> None:
        """Remove that step's folder, manifest first, so that it never counts as complete."""

        def remove() -> None:
            fs, root = self._open()
            folder = f"{root}/{step_name(step)}"
            if fs.exists(f"{folder}/{NAME}"):
                fs.rm_file(f"{folder}/{NAME}")
            if fs.exists(folder):
                fs.rm(folder, recursive=True)

        self._answer(remove)

    def push(self, folder: Path, names: Iterable[str]) -> None:
        """Copy files of a checkpoint to the mirror."""

        def copy() -> None:
            fs, root = self._open()
            fs.makedirs(f"{root}/{folder.name}", exist_ok=True)
            for name in names:
                fs.put_file(str(folder / name), f"{root}/{folder.name}/{name}")

        self._answer(copy)

    def complete(self, folder: Path) -> None:
        """Copy the manifest, once all files are in the mirror with their sizes."""

        def check() -> None:
            fs, root = self._open()
            for name, entry in read_manifest(folder).files.items():
                size = fs.size(f"{root}/{folder.name}/{name}")
                if size != entry.bytes:
                    raise OSError(f"{folder.name}/{name} has {size} bytes there, {entry.bytes} here")

        self._answer(check)
        self.push(folder, [NAME])

    def keep_records(self, run_folder: Path) -> None:
        """Copy the files that a run needs to continue besides a checkpoint: its recipe, and the ledger with its
        rewinds."""

        def copy() -> None:
            fs, root = self._open()
            fs.makedirs(root, exist_ok=True)
            for name in filter(lambda name: (run_folder / name).is_file(), RECORDS):
                fs.put_file(str(run_folder / name), f"{root}/{name}")

        self._answer(copy)

    def bring_records(self, run_folder: Path) -> None:
        """Write these files into a new run folder, each complete or not at all, the recipe last."""

        def copy() -> None:
            fs, root = self._open()
            if not fs.exists(f"{root}/{RECORDS[-1]}"):
                raise OSError(f"there is no {RECORDS[-1]}; give the folder of a run's name in its checkpoint.mirror_to")
            make_folder(run_folder)
            for name in RECORDS:
                if fs.exists(f"{root}/{name}"):
                    with atomic_write(run_folder / name, durable=True) as temporary:  # each rank writes them
                        fs.get_file(f"{root}/{name}", str(temporary))
                        if name == identity.NAME:
                            temporary.write_text(identity.without_place(temporary.read_text()))

        self._answer(copy)

    def pull(self, step: int, names: Iterable[str], folder: Path) -> None:
        """Copy files of that step's checkpoint to a local folder."""

        def copy() -> None:
            fs, root = self._open()
            for name in names:
                fs.get_file(f"{root}/{step_name(step)}/{name}", str(folder / name))

        self._answer(copy)

    def _open(self) -> tuple[AbstractFileSystem, str]:
        fs, root = url_to_fs(self.url, use_listings_cache=False)
        return fs, root.rstrip("/")

    def _answer(self, ask: Callable[[], Result]) -> Result:
        try:
            return ask()
        except Exception as error:  # every file system has errors of its own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"checkpoint.mirror_to={self.url}: {reason}") from error


def mirror(
    folder: Path, saved: int, since: int, remote: Remote, keep: Retention, coordinator: Coordinator, copying: set[int]
) -> list[int]:
    """Copy the complete checkpoints of `folder` that the mirror lacks, newest first; then remove there what `keep` lets
    go.

    Checkpoints up to step `saved` are copied, with the run's recipe and ledger. `since`: the newest step whose copy can
    belong to this run's past; later ones were undone by a rewind and are removed. `copying` holds the step of each
    checkpoint while it is copied. Returns the steps that were copied. All ranks call it; it raises `CheckpointError` on
    all.
    """

    def missing() -> list[int]:
        ours, owner = identity.read(folder.parent), remote.owner()
        if ours and owner not in ("", ours.id):
            raise CheckpointError(
                f"checkpoint.mirror_to={remote.url}: it holds another run's checkpoints; "
                "resume this one with another checkpoint.mirror_to"
            )
        here = [step_of(path) for path in list_checkpoints(folder) if has_all_bytes(path)]
        there = remote.steps()
        for step in there:
            if step > since:
                remote.clear(step)
        there = {step for step in there if step <= since}
        stay = keep.chosen({step for step in (*here, *there) if step <= saved})
        return [step for step in here if step not in there and step in stay]

    steps = coordinator.from_first(missing)
    for step in steps:
        path = folder / step_name(step)
        copying.add(step)
        try:
            coordinator.from_first(lambda step=step: remote.clear(step))
            coordinator.run_on_all_ranks(
                lambda path=path: remote.push(path, coordinator.share(sorted(read_manifest(path).files)))
            )
            coordinator.from_first(lambda path=path: remote.complete(path))
        finally:
            copying.discard(step)
    coordinator.from_first(lambda: remote.keep_records(folder.parent))
    coordinator.from_first(lambda: _prune(remote, keep))
    return steps


def fetch(remote: Remote, step: int, folder: Path, coordinator: Coordinator) -> Path:
    """Copy that step's checkpoint from the mirror into `folder`, not yet verified.

    All ranks call it; it raises `CheckpointError` on all.
    """
    final, temporary = folder / step_name(step), folder / f".tmp-{step_name(step)}"

    def prepare() -> list[str]:
        shutil.rmtree(temporary, ignore_errors=True)
        make_folder(folder)
        temporary.mkdir()
        remote.pull(step, [NAME], temporary)
        return sorted(read_manifest(temporary).files)

    def finish() -> None:
        shutil.rmtree(final, ignore_errors=True)  # it is incomplete, otherwise it would not be fetched
        sync_tree(temporary)
        rename_durably(temporary, final)

    names = coordinator.from_first(lambda: _local(prepare, folder))
    coordinator.run_on_all_ranks(lambda: remote.pull(step, coordinator.share(names), temporary))
    coordinator.from_first(lambda: _local(finish, folder))
    return final


def _prune(remote: Remote, keep: Retention) -> None:
    for step in set(remote.steps(complete=False)) - keep.chosen(remote.steps()):
        remote.clear(step)


def _local(act: Callable[[], Any], folder: Path) -> Any:
    try:
        return act()
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror}") from error
