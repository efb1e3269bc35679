"""MDS, the format of mosaicml-streaming: a folder with index.json and shards, of which one column holds text.

A shard, little endian: u32 N samples · u32[N + 1] byte offsets of the samples · its configuration · the samples.
A sample: u32 size of each column without a fixed size · the columns' values, one after another.
A shard may be compressed as a whole; then another file holds it, which index.json names too.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steptron.data.opening import DAMAGED, NotReadable, open_plain, shown, why
from steptron.data.readers import Item, Unread, no_field, stamp

INDEX_NAME = "index.json"


@dataclass(frozen=True)
class MdsShard:
    """One shard, with one document per sample."""

    path: Path
    num_bytes: int
    column: int
    """The place of the text among the columns."""
    sizes: tuple[int | None, ...]
    """The fixed size in bytes of each column, None where each sample has its own."""

    @property
    def origin(self) -> str:
        return f"{stamp(self.path)} {self.column}"

    def documents(self) -> Iterator[str | Unread]:
        place, count = shown(self.path), 0
        try:
            with open_plain(self.path) as file:
                data = file.read()
            (num_samples,) = struct.unpack_from("<I", data)
            offsets = np.frombuffer(data, "<u4", num_samples + 1, 4)
            for count in range(num_samples):
                begin, end = int(offsets[count]), int(offsets[count + 1])
                value = self._value(data, begin, end)
                try:
                    text = value.decode()
                except UnicodeDecodeError:
                    yield Unread(f"{place}, sample {count}:", "is not UTF-8: convert it or leave it out")
                else:
                    yield text or Unread(f"{place}, sample {count}:", "is empty: leave it out")
        except (*DAMAGED, struct.error, ValueError) as error:
            reason = f"cannot be read further ({why(error)}): copy it again or leave it out"
            yield Unread(f"{place}, after {count} samples:", reason)

    def _value(self, data: bytes, begin: int, end: int) -> bytes:
        """Return the bytes of the text of the sample in [begin, end)."""
        own = self.sizes.count(None)
        given = iter(struct.unpack_from(f"<{own}I", data, begin))
        sizes = [next(given) if size is None else size for size in self.sizes]
        if begin + 4 * own + sum(sizes) != end or end > len(data):
            raise ValueError("the sizes of a sample do not add up")
        start = begin + 4 * own + sum(sizes[: self.column])
        return data[start : start + sizes[self.column]]


def is_mds(folder: Path) -> bool:
    """Return True if the folder's index.json is that of an MDS dataset."""
    try:
        shards = json.loads((folder / INDEX_NAME).read_text())["shards"]
        return bool(shards) and all(shard["format"] == "mds" for shard in shards)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def mds_items(folder: Path, text_field: str) -> Iterator[Item]:
    """Yield the shards of an MDS dataset. Raises NotReadable if one is missing or has no such column of text."""
    shards: list[dict[str, Any]] = json.loads((folder / INDEX_NAME).read_text())["shards"]
    for shard in shards:
        names = shard["column_names"]
        if text_field not in names:
            raise NotReadable(no_field(text_field, names))
        column = names.index(text_field)
        if shard["column_encodings"][column] != "str":
            found = shard["column_encodings"][column]
            raise NotReadable(f"has no text in the field {text_field!r}, but {found}: name another with --text-field")
        files = [shard[key]["basename"] for key in ("raw_data", "zip_data") if shard.get(key)]
        path = next((folder / name for name in files if (folder / name).is_file()), None)
        if path is None:
            raise NotReadable(f"lacks its shard {files[0]}: copy it again")
        if path.suffix in (".br", ".snappy"):
            raise NotReadable(f"has a shard of an unknown compression, {path.name}: decompress it first")
        yield MdsShard(path, shard["raw_data"]["bytes"], column, tuple(shard["column_sizes"]))
