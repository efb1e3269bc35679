"""MDS, the format of mosaicml-streaming: a folder with index.json and shards, of which one column holds text.

A shard, little endian: u32 N samples · u32[N + 1] byte offsets of the samples · its configuration · the samples.
A sample: u32 size of each column without a fixed size · the columns' values, one after another. Columns that are read
hold text (str), a whole number (int, i64) or JSON (json).
A shard may be compressed as a whole; then another file holds it, which index.json names too.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from steptron.data.fields import Fields, no_field
from steptron.data.opening import DAMAGED, NotReadable, open_plain, shown, why
from steptron.data.readers import Item, Unread, row_text, stamp

INDEX_NAME = "index.json"
_READERS = {"str": bytes.decode, "int": lambda value: struct.unpack("<q", value)[0], "json": json.loads}
"""The encodings of columns that are read."""


@dataclass(frozen=True)
class MdsShard:
    """One shard, with one document per sample."""

    path: Path
    num_bytes: int
    columns: tuple[tuple[str, str, int], ...]
    """The columns that are read: name, encoding, and place among all columns."""
    sizes: tuple[int | None, ...]
    """The fixed size in bytes of each column, None where each sample has its own."""
    fields: Fields

    @property
    def origin(self) -> str:
        place = next(place for name, _, place in self.columns if name == self.fields.text)
        return f"{stamp(self.path)} {place}{self.fields.marks}"

    def documents(self) -> Iterator[str | Unread]:
        place, count = shown(self.path), 0
        try:
            with open_plain(self.path) as file:
                data = file.read()
            (num_samples,) = struct.unpack_from("<I", data)
            offsets = np.frombuffer(data, "<u4", num_samples + 1, 4)
            for count in range(num_samples):
                begin, end = int(offsets[count]), int(offsets[count + 1])
                bounds = self._bounds(data, begin, end)
                try:
                    record = {name: _READERS[kind](data[slice(*bounds[n])]) for name, kind, n in self.columns}
                except UnicodeDecodeError:
                    record = None
                yield row_text(record, self.fields, f"{place}, sample {count}:")
        except (*DAMAGED, struct.error, ValueError) as error:
            reason = f"cannot be read further ({why(error)}): copy it again or leave it out"
            yield Unread(f"{place}, after {count} samples:", reason)

    def _bounds(self, data: bytes, begin: int, end: int) -> list[tuple[int, int]]:
        """Return the range of the bytes of each column of the sample in [begin, end)."""
        own = self.sizes.count(None)
        given = iter(struct.unpack_from(f"<{own}I", data, begin))
        sizes = [next(given) if size is None else size for size in self.sizes]
        if begin + 4 * own + sum(sizes) != end or end > len(data):
            raise ValueError("the sizes of a sample do not add up")
        return list(pairwise(accumulate(sizes, initial=begin + 4 * own)))


def is_mds(folder: Path) -> bool:
    """Return True if the folder's index.json is that of an MDS dataset."""
    try:
        shards = json.loads((folder / INDEX_NAME).read_text())["shards"]
        return bool(shards) and all(shard["format"] == "mds" for shard in shards)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def mds_items(folder: Path, fields: Fields) -> Iterator[Item]:
    """Yield the shards of an MDS dataset. Raises NotReadable if one is missing or lacks a column that is read."""
    shards: list[dict[str, Any]] = json.loads((folder / INDEX_NAME).read_text())["shards"]
    for shard in shards:
        columns = tuple(_column(shard, name, option) for name, option in fields.options.items())
        files = [shard[key]["basename"] for key in ("raw_data", "zip_data") if shard.get(key)]
        path = next((folder / name for name in files if (folder / name).is_file()), None)
        if path is None:
            raise NotReadable(f"lacks its shard {files[0]}: copy it again")
        if path.suffix in (".br", ".snappy"):
            raise NotReadable(f"has a shard of an unknown compression, {path.name}: decompress it first")
        yield MdsShard(path, shard["raw_data"]["bytes"], columns, tuple(shard["column_sizes"]), fields)


def _column(shard: dict[str, Any], name: str, option: str) -> tuple[str, str, int]:
    """Return name, encoding and place of a column. Raises NotReadable."""
    if name not in shard["column_names"]:
        raise NotReadable(no_field(name, shard["column_names"], option))
    place = shard["column_names"].index(name)
    encoding = shard["column_encodings"][place]
    if encoding not in (_READERS if option != "--text-field" else ("str",)):
        raise NotReadable(f"has no text in the field {name!r}, but {encoding}: name another with {option}")
    return name, encoding, place
