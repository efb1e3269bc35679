"""`.metadata`: torch's description of a checkpoint's tensors, and of the positions of their pieces in its files.

The file is a pickle.

    save ─ write_metadata: the same from every Python ─► .metadata ─ read_metadata: data only ─► find, inspect, load

One reader serves all of them and the save itself. So a checkpoint that cannot be loaded is neither published nor
counted as complete.
"""

import pickle
from enum import Enum
from math import prod
from pathlib import Path, PurePosixPath

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from steptron.checkpoint.manifest import Manifest
from steptron.errors import CheckpointError
from steptron.torch_internals import MemoryFormat

NAME = ".metadata"
PROTOCOL = 4
"""The pickle protocol is fixed, because the default differs between Pythons."""

_PLAIN = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
"""The names that the pickle may use, by module, besides torch's data types."""


def _member(kind: object, name: str) -> Enum:
    if kind is not MemoryFormat:
        raise pickle.UnpicklingError(
            f"it asks for an attribute of {kind!r}, which does not belong into a description of tensors"
        )
    return MemoryFormat[name]


_STAND_INS = {
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,  # Python 3.13
    ("builtins", "getattr"): _member,  # Python 3.11.0 to 3.11.3, for members of enumerations
}
"""The names in checkpoints that torch pickled, before `write_metadata` did → a safe replacement for each."""


class _Pickler(pickle.Pickler):
    """A pickler that names nothing which another Python may lack or refuse."""

    def reducer_override(self, value: object) -> object:
        """Write a member of an enumeration by its value. Python 3.11.0 to 3.11.3 would ask for `getattr`."""
        return (type(value), (value.value,)) if isinstance(value, Enum) else NotImplemented


class _Unpickler(pickle.Unpickler):
    """An unpickler that makes descriptions of tensors and nothing else."""

    def find_class(self, module: str, name: str) -> object:
        """Return the class, or the data type, that the pickle names. Raises `pickle.UnpicklingError`."""
        if (module, name) in _STAND_INS:
            return _STAND_INS[module, name]
        if name in _PLAIN.get(module, ()):
            return super().find_class(module, name)
        found = super().find_class(module, name) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which does not belong into a description of tensors")


def write_metadata(metadata: Metadata, folder: Path) -> None:
    """Write `.metadata`, the same from every Python and torch, wherever the folder lies.

    Its `storage_meta` is left out: a path (each Python pickles its own class of it) and a random id, which no reader
    needs.
    """
    metadata.storage_meta = None
    with (folder / NAME).open("wb") as file:
        _Pickler(file, PROTOCOL).dump(metadata)


def read_metadata(folder: Path, manifest: Manifest) -> Metadata:
    """Return the description of a checkpoint's tensors. No code that the file names is run.

    Raises `CheckpointError` if it is not such a description, or if an element of a tensor has no place in the files.
    """
    try:
        with (folder / NAME).open("rb") as file:
            metadata = _Unpickler(file).load()
        _check(metadata, manifest)
    except OSError as error:
        raise CheckpointError(f"{folder / NAME} cannot be read: {error.strerror}") from error
    except Exception as error:  # a pickle that is not ours can make any of its parts fail
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{folder / NAME} cannot be read: {reason}") from error
    return metadata


def _check(metadata: object, manifest: Manifest) -> None:
    """Raise `ValueError` unless every element of every tensor has a place in the checkpoint's files."""
    if not isinstance(metadata, Metadata):
        raise ValueError(f"it holds a {type(metadata).__name__}, not a description of tensors")
    for name, tensor in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(tensor, TensorStorageMetadata):
            raise ValueError(f"{name} is not a tensor")
        for chunk in tensor.chunks:
            _check_place(name, tensor, chunk, metadata, manifest)
        found, all_ = sum(prod(chunk.sizes) for chunk in tensor.chunks), prod(tensor.size)
        if found != all_:
            raise ValueError(f"it describes {found} elements of {name}, which has {all_}")


def _check_place(
    name: str, tensor: TensorStorageMetadata, chunk: ChunkStorageMetadata, metadata: Metadata, manifest: Manifest
) -> None:
    edges = zip(chunk.offsets, chunk.sizes, tensor.size, strict=True)
    if not all(0 <= offset <= offset + size <= whole for offset, size, whole in edges):
        raise ValueError(f"a piece of {name} at {tuple(chunk.offsets)} lies outside the tensor")
    place = metadata.storage_data.get(MetadataIndex(name, chunk.offsets))
    if place is None:
        raise ValueError(f"it does not say in which file {name} at {tuple(chunk.offsets)} lies")
    entry = manifest.files.get(place.relative_path)
    if entry is None or not 0 <= place.offset <= place.offset + place.length <= entry.bytes:
        raise ValueError(f"{name} at {tuple(chunk.offsets)} lies in no file of the manifest")
