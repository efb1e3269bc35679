"""The description of a checkpoint's tensors: the same from every Python, and opened by one reader wherever a checkpoint
is judged."""

import dataclasses
import enum
import functools
import json
import os
import pathlib
import pickle
import pickletools
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import blank, same_bits, save_step, some_tensors
from steptron.checkpoint import save as saving
from steptron.checkpoint.find import find_complete, newest_complete
from steptron.checkpoint.load import load
from steptron.checkpoint.manifest import describe_file, read_manifest, write_manifest
from steptron.checkpoint.metadata import read_metadata
from steptron.config.resolve import resolve, to_yaml
from steptron.errors import CheckpointError, SaveError
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from small_runs import steptron

BEFORE = Path(__file__).parent / "written_before"
"""`.metadata` and data of three tensors, as torch's own pickler wrote them on Pythons that pickle paths and
enumerations differently."""
SOURCE = Path(saving.__file__).parents[1]
SMALL = Path(__file__).parents[1] / "config" / "small.yaml"


def globals_of(content: bytes) -> Iterator[str]:
    """The names that a pickle imports, found without loading it: its strings, with the memo that holds them."""
    memo, stack = {}, []
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif opcode.name in ("GLOBAL", "INST"):
            yield argument.replace(" ", ".")
        else:
            if opcode.name == "STACK_GLOBAL":
                yield ".".join(stack[-2:])
            stack.append(argument if isinstance(argument, str) else None)


@pytest.fixture(params=["this Python", "as Python 3.11.2 and 3.13 pickle"])
def pickling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "this Python":
        monkeypatch.setattr(enum.Enum, "__reduce_ex__", lambda self, protocol: (getattr, (type(self), self.name)))
        monkeypatch.setattr(pathlib.Path, "__reduce__", lambda self: (os.fspath, (str(self),)))


@pytest.mark.usefixtures("pickling")
def test_it_names_only_what_torch_has_on_every_python(tmp_path: Path):
    content = (save_step(tmp_path, 10) / ".metadata").read_bytes()
    names = set(globals_of(content))
    assert "torch.Size" in names
    assert {name for name in names if not name.startswith("torch.")} == set()
    assert {argument for opcode, argument, _ in pickletools.genops(content) if opcode.name == "PROTO"} == {4}


def test_it_does_not_depend_on_the_folder_or_the_time(tmp_path: Path):
    first, second = save_step(tmp_path / "one", 10), save_step(tmp_path / "two", 10)
    content = (first / ".metadata").read_bytes()
    assert content == (second / ".metadata").read_bytes()
    assert tmp_path.name.encode() not in content


def test_torch_reads_it_too(tmp_path: Path):
    path, tensors = save_step(tmp_path, 10), some_tensors(10)
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    assert {name: tuple(entry.size) for name, entry in stored.items()} == {
        k: tuple(t.shape) for k, t in tensors.items()
    }


@pytest.mark.parametrize("python", ["python-3.11.2", "python-3.11.7", "python-3.13.0"])
def test_what_torch_pickled_on_any_python_still_loads(tmp_path: Path, python: str):
    saved = {
        "model.matrix": torch.arange(12.0).view(3, 4),
        "optimizer.half": torch.tensor(0.5).bfloat16(),
        "counts": torch.arange(4),
    }
    path = save_step(tmp_path / "checkpoints", 10, saved)
    for name in (".metadata", "__0_0.distcp"):
        shutil.copy(BEFORE / python / name, path / name)
    seal(path)
    tensors = blank(saved)
    load(find_complete(tmp_path), tensors)
    assert all(same_bits(tensors[name], t) for name, t in saved.items())


def seal(path: Path) -> None:
    """Have the manifest say of the files what they are now, as if they had been saved so."""
    manifest = read_manifest(path)
    files = {name: describe_file(path / name) for name in manifest.files}
    write_manifest(dataclasses.replace(manifest, files=files), path)


class Calls:
    """A pickle of it calls a function."""

    def __init__(self, function: Callable, *arguments: object):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def described(change: Callable[[Metadata], object]) -> Callable[[bytes], bytes]:
    """A description with one thing in it changed."""

    def apply(content: bytes) -> bytes:
        metadata = pickle.loads(content)
        change(metadata)
        return pickle.dumps(metadata)

    return apply


def matrix(metadata: Metadata) -> TensorStorageMetadata:
    entry = metadata.state_dict_metadata["model.matrix"]
    assert isinstance(entry, TensorStorageMetadata)
    return entry


def place(metadata: Metadata, **changes: object) -> None:
    """Change where the matrix lies."""
    (index,) = (index for index in metadata.storage_data if index.fqn == "model.matrix")
    metadata.storage_data[index] = dataclasses.replace(metadata.storage_data[index], **changes)


BAD: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a command": (lambda _: pickle.dumps(Calls(os.system, "false")), r"it names posix\.system"),
    "eval": (lambda _: pickle.dumps(Calls(eval, "1")), r"it names builtins\.eval"),
    "a partial": (lambda _: pickle.dumps(functools.partial(print)), r"it names functools\.partial"),
    "a function of torch": (lambda _: pickle.dumps(Calls(torch.load, "x")), r"it names torch\.serialization\.load"),
    "an attribute": (lambda _: pickle.dumps(Calls(getattr, Metadata, "__init__")), "it asks for an attribute of"),
    "a class that no longer is": (
        lambda content: content.replace(b"_StorageInfo", b"_StorageGone"),
        r"it names torch\.distributed\.checkpoint\.filesystem\._StorageGone",
    ),
    "nothing": (lambda _: b"", "Ran out of input"),
    "cut short": (lambda content: content[: len(content) // 2], "truncated"),
    "without its end": (lambda content: content[:-1], "truncated|Ran out of input"),
    "no pickle": (lambda _: b"step 20\n", "cannot be read"),
    "a number": (lambda _: pickle.dumps(7), "it holds a int, not a description of tensors"),
    "a key missing": (described(lambda m: m.__dict__.pop("state_dict_metadata")), "state_dict_metadata"),
    "no places": (described(lambda m: setattr(m, "storage_data", None)), "NoneType"),
    "a place missing": (
        described(lambda m: m.storage_data.pop(next(i for i in m.storage_data if i.fqn == "model.matrix"))),
        r"it does not say in which file model\.matrix at \(0, 0\) lies",
    ),
    "a piece missing": (
        described(lambda m: matrix(m).chunks.clear()),
        r"it describes 0 elements of model\.matrix, which has 35",
    ),
    "a piece too large": (
        described(lambda m: setattr(matrix(m), "size", torch.Size((5, 6)))),
        r"a piece of model\.matrix at \(0, 0\) lies outside the tensor",
    ),
    "bytes": (
        described(lambda m: m.state_dict_metadata.update({"model.matrix": BytesStorageMetadata()})),
        r"BytesStorageMetadata",
    ),
    "another file": (described(lambda m: place(m, relative_path="../../x")), r"model\.matrix .* lies in no file"),
    "beyond the file": (described(lambda m: place(m, offset=1 << 40)), r"model\.matrix .* lies in no file"),
    "before the file": (described(lambda m: place(m, offset=-8)), r"model\.matrix .* lies in no file"),
}
"""Descriptions that loading refuses: what is done to a good one, and the reason that is given."""


@pytest.mark.parametrize("bad", BAD)
def test_what_loading_refuses_is_not_called_complete(tmp_path: Path, bad: str):
    """By the loader, by what finds the newest, and by `inspect`: each gives the same reason. Its checksum is right."""
    change, reason = BAD[bad]
    older, newest = save_step(tmp_path / "checkpoints", 10), save_step(tmp_path / "checkpoints", 20)
    metadata = newest / ".metadata"
    metadata.write_bytes(change(metadata.read_bytes()))
    seal(newest)
    with pytest.raises(CheckpointError, match=reason) as loading:
        load(newest, blank(some_tensors()))
    why = str(loading.value)
    assert why.startswith(f"{metadata} cannot be read: ")
    assert "\n" not in why
    assert newest_complete(tmp_path / "checkpoints") == (older, [why])
    with pytest.raises(CheckpointError) as finding:
        find_complete(newest)
    assert str(finding.value) == why
    (tmp_path / "recipe.yaml").write_text(to_yaml(resolve(str(SMALL))))
    summary = json.loads(steptron("inspect", newest, "--json").stdout)
    assert [checkpoint["problem"] for checkpoint in summary["checkpoints"]] == [why]
    assert summary["resume"]["skips"] == [why]


@pytest.mark.parametrize("bad", BAD)
def test_what_loading_refuses_is_not_published(tmp_path: Path, bad: str, monkeypatch: pytest.MonkeyPatch):
    change, reason = BAD[bad]
    older = save_step(tmp_path, 10, keep=1)
    write = saving.write_metadata

    def write_badly(metadata: Metadata, folder: Path) -> None:
        write(metadata, folder)
        (folder / ".metadata").write_bytes(change((folder / ".metadata").read_bytes()))

    monkeypatch.setattr(saving, "write_metadata", write_badly)
    with pytest.raises(
        SaveError, match=f"checkpoint of step 20 is not kept, because it could not be loaded: .*{reason}"
    ) as caught:
        save_step(tmp_path, 20, keep=1)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [older]
    assert newest_complete(tmp_path) == (older, [])


def test_a_description_that_the_disk_does_not_give_back(tmp_path: Path):
    path = save_step(tmp_path, 10)
    manifest = read_manifest(path)
    (path / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000010/\.metadata cannot be read: No such file"):
        read_metadata(path, manifest)


def test_no_other_code_unpickles():
    """torch's reader of `.metadata` runs what it names: only `load.py` may use it, given a description that was read
    here."""
    sources = {path.relative_to(SOURCE).as_posix(): path.read_text() for path in SOURCE.rglob("*.py")}
    assert {name for name, text in sources.items() if "FileSystemReader" in text} == {"checkpoint/load.py"}
    assert {name for name, text in sources.items() if re.search(r"pickle\.loads?\(", text)} == {"prove/spawn.py"}, (
        "what its ranks wrote"
    )
