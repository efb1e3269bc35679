"""Datasets of the Hugging Face Hub by name, streamed: `datasets:NAME`, `datasets:NAME:SUBSET` or
`datasets:NAME:SUBSET:SPLIT` (train, if none is given).

name → the commit of the dataset, its number of shards → one item per shard → rows, streamed by some process
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from steptron.data.fields import Fields
from steptron.data.opening import why
from steptron.data.readers import Item, Unread, row_text
from steptron.errors import DataError

PREFIX = "datasets:"
_SHARD_BYTES = 2**28
"""The assumed size of a shard whose dataset does not tell its size."""


@dataclass(frozen=True)
class HubShard:
    """One shard of a dataset, with one document per row. `revision` is the commit that all shards are read from."""

    name: str
    subset: str | None
    split: str
    revision: str
    index: int
    num_shards: int
    num_bytes: int
    fields: Fields

    @property
    def origin(self) -> str:
        return f"{self._place()} {self.revision} {self.fields.origin}"

    def documents(self) -> Iterator[str | Unread]:
        count = 0
        try:
            rows = _stream(self.name, self.subset, self.split, self.revision).shard(self.num_shards, self.index)
            for record in rows:
                yield row_text(dict(record), self.fields, f"{self._place()}, row {count}:")
                count += 1
        except Exception as error:  # datasets and the network raise errors of many kinds
            reason = f"cannot be read further ({why(error)}): try again, or leave it out"
            yield Unread(f"{self._place()}, after {count} rows:", reason)

    def _place(self) -> str:
        subset = f":{self.subset}" if self.subset else ""
        return f"{PREFIX}{self.name}{subset}:{self.split}, shard {self.index} of {self.num_shards}"


def hub_items(spec: str, fields: Fields) -> Iterator[Item]:
    """Yield the shards of a dataset. Raises DataError if it cannot be reached or does not exist."""
    from huggingface_hub import HfApi

    name, subset, split = (*spec.removeprefix(PREFIX).split(":"), "", "")[:3]
    split = split or "train"
    if not name or spec.count(":") > 3:
        raise DataError(f"{spec} must be {PREFIX}NAME, {PREFIX}NAME:SUBSET or {PREFIX}NAME:SUBSET:SPLIT")
    try:
        revision = HfApi().dataset_info(name).sha or "main"
        rows = _stream(name, subset or None, split, revision)
        num_shards = rows.num_shards
    except Exception as error:  # the same
        raise DataError(
            f"{spec} cannot be opened ({why(error)}): check name, subset and split; it needs the network and, for "
            "some, `hf auth login`; without a network, give files or a folder of save_to_disk"
        ) from error
    splits = rows.info.splits or {}
    size = splits[split].num_bytes // num_shards if split in splits else _SHARD_BYTES
    for index in range(num_shards):
        yield HubShard(name, subset or None, split, revision, index, num_shards, size or _SHARD_BYTES, fields)


def _stream(name: str, subset: str | None, split: str, revision: str) -> Any:
    from datasets import load_dataset

    return load_dataset(name, subset, split=split, revision=revision, streaming=True)
