"""Shards that another program wrote become a source, without a copy: a folder of links and a source.json.

Megatron: X.bin, X.idx             ─┐                       ┌─ shard-00000.bin → X.bin
datatrove: X.ds, X.ds.index (ends) ─┴→ checked, summed up ──┼─ shard-00000.idx → X.idx, or written from X.ds.index
                                                            └─ source.json
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np

from steptron.atomic import atomic_folder
from steptron.data import tokenizer
from steptron.data.megatron_format import IndexedDataset, write_index
from steptron.data.opening import as_typed
from steptron.data.readers import stamp
from steptron.data.source import ShardedSource, ShardInfo, SourceInfo, describe_shard
from steptron.data.tokenize import BuildReporter, Built, locked
from steptron.errors import DataError


@dataclass(frozen=True, kw_only=True)
class ImportRequest:
    """The arguments of `steptron data import`."""

    shards: tuple[str, ...]
    """Each X.bin, X.idx or X of Megatron, or X.ds of datatrove."""
    out: Path
    """The folder of the tokenizer and of the sources."""
    name: str
    """The name of the source."""
    tokenizer: Path | None
    """The tokenizer.json that the shards were made with. None means the one in `out`."""
    eos: str | None
    """The token at the end of each document. None means the one usual name that the tokenizer has."""
    workers: int
    """The number of threads that read the shards."""


class _Files(NamedTuple):
    """The files of one shard."""

    tokens: Path
    index: Path

    @property
    def is_datatrove(self) -> bool:
        return self.tokens.suffix == ".ds"


def import_shards(request: ImportRequest, progress: BuildReporter) -> Built:
    """Write the source into request.out. One that is there from the same files is kept.

    Raises DataError if a file is missing or damaged, was made with another tokenizer, or has a document without its
    end.
    """
    shards = list(dict.fromkeys(_files(name) for name in request.shards))
    for path in (path for files in shards for path in files):
        if not path.is_file():
            raise DataError(f"{path} does not exist: name shards as PREFIX, PREFIX.bin or NAME.ds")
    try:
        request.out.mkdir(parents=True, exist_ok=True)
        with locked(request.out):
            path = request.out / "tokenizer.json"
            if request.tokenizer:
                tokenizer.put(request.tokenizer, path, request.eos)
            return _import(request, shards, tokenizer.load(path, request.eos), progress)
    except OSError as error:
        raise DataError(f"{request.out}: the import stopped, {error}; nothing unfinished was kept") from error


def _files(name: str) -> _Files:
    path = Path(name).absolute()
    if path.suffix == ".ds":
        return _Files(path, Path(f"{path}.index"))
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    return _Files(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"))


def _import(
    request: ImportRequest, shards: Sequence[_Files], used: tokenizer.LoadedTokenizer, progress: BuildReporter
) -> Built:
    folder = request.out / request.name
    lines = [*(stamp(path) for files in shards for path in files), f"eos {used.eos_id}"]
    origin = hashlib.blake2b("\n".join(lines).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    if folder.exists():
        existing = ShardedSource(folder).info
        if (existing.origin, existing.tokenizer_hash) != (origin, used.hash):
            raise DataError(f"{folder} was made from other files: remove it to import these, or give another --name")
        return Built(folder, existing, False)
    progress.begin(request.name, sum(files.tokens.stat().st_size for files in shards))
    with atomic_folder(folder) as temporary, ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(request.workers))
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        prefixes = [temporary / f"shard-{number:05d}" for number in range(len(shards))]
        checked = []
        for result, files in zip(pool.map(_shard, shards, prefixes, repeat(used)), shards, strict=True):
            checked.append(result)
            progress.advance(files.tokens.stat().st_size)
        info = _info(request, origin, used, checked)
        info.write(temporary)
    return Built(folder, info, True)


def _shard(files: _Files, prefix: Path, used: tokenizer.LoadedTokenizer) -> tuple[ShardInfo, int]:
    """Link the shard's files to PREFIX.bin and PREFIX.idx, and return its description and its largest id."""
    Path(f"{prefix}.bin").symlink_to(files.tokens)
    if files.is_datatrove:
        _write_index(files, Path(f"{prefix}.idx"))
    else:
        Path(f"{prefix}.idx").symlink_to(files.index)
    try:
        shard = IndexedDataset(prefix)
        largest = shard.check(used.vocab_size, used.eos_id)
    except DataError as error:
        message = str(error).replace(f"{prefix}.bin", str(files.tokens)).replace(f"{prefix}.idx", str(files.index))
        raise DataError(message) from error
    return describe_shard(prefix, shard.num_documents, shard.num_tokens), largest


def _write_index(files: _Files, path: Path) -> None:
    """Write the .idx of a datatrove file, whose index is the end of each document in tokens, u64."""
    size = files.index.stat().st_size
    ends = np.fromfile(files.index, dtype="<u8").astype(np.int64)
    num_bytes = files.tokens.stat().st_size
    lengths = np.diff(ends, prepend=0)
    total = int(ends[-1]) if len(ends) else 0
    width, rest = divmod(num_bytes, total) if total else (0, num_bytes)
    if size % 8 or rest or width not in (0, 2, 4) or (lengths < 0).any():
        raise DataError(
            f"{files.index} does not fit {files.tokens}: it says {total} tokens, the file has {num_bytes} bytes, and a "
            "token has 2 or 4: copy both again"
        )
    write_index(path, np.dtype("<u2" if width != 4 else "<i4"), lengths)


def _info(
    request: ImportRequest, origin: str, used: tokenizer.LoadedTokenizer, checked: Sequence[tuple[ShardInfo, int]]
) -> SourceInfo:
    shards = tuple(shard for shard, _ in checked)
    if not sum(shard.num_tokens for shard in shards):
        raise DataError(
            f"{as_typed(request.shards)}: no tokens there, an empty source is not useful: give other shards"
        )
    return SourceInfo(
        spec=as_typed(request.shards),
        action="import",
        origin=origin,
        tokenizer_hash=used.hash,
        vocab_size=used.vocab_size,
        eos_id=used.eos_id,
        eos=used.eos,
        max_token_id=max(largest for _, largest in checked),
        num_documents=sum(shard.num_documents for shard in shards),
        num_tokens=sum(shard.num_tokens for shard in shards),
        num_text_bytes=0,
        shards=shards,
    )
