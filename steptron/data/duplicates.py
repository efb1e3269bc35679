"""Copies of documents, found when all parts of a source are done, and left out of its shards.

KEY.npy of each part (marks of each document) → first_copies → KEY.bin, .idx, .masks without later copies → KEY.kept.*

Which documents are copies depends on the inputs and their order only, not on processes or on --shard.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from steptron.data import masks, parts
from steptron.data.megatron_format import IndexedDataset, IndexedWriter
from steptron.data.source import describe_shard


def first_copies(marks: Sequence[np.ndarray]) -> np.ndarray:
    """Return for each document the first one that it is a copy of, or its own number. `marks`: [documents, places] u64.

    Documents that share a mark in a place are copies, and so are copies of copies: the smallest number of each
    connected group, by repeated minima over the groups of equal marks.
    """
    first = np.arange(sum(len(part) for part in marks))
    changed = len(first) > 0
    while changed:
        changed = False
        for place in range(marks[0].shape[1]):
            column = np.concatenate([part[:, place] for part in marks])
            order = np.argsort(column, kind="stable")
            column = column[order]
            begins = np.flatnonzero(np.concatenate([[True], column[1:] != column[:-1]]))
            least = np.minimum.reduceat(first[order], begins)
            least = np.repeat(least, np.diff(begins, append=len(first)))
            if (least != first[order]).any():
                first[order] = least
                changed = True
    return first


def drop(
    folder: Path, results: Sequence[parts.PartResult], rules: parts.Rules, workers: int, advance: Callable[[int], None]
) -> tuple[list[parts.PartResult], list[str]]:
    """Return the parts without later copies, and the beginnings of documents that were left out."""
    tables = [np.load(folder / f"{result.shard.name}.npy", mmap_mode="r") for result in results]
    first = first_copies([table[:, 1:] for table in tables])
    borders = np.cumsum([0, *(len(table) for table in tables)])
    copies = [np.flatnonzero(first[a:b] != np.arange(a, b)) for a, b in pairwise(borders)]
    touched = [number for number, dropped in enumerate(copies) if len(dropped)]
    tasks = [(folder / results[number].shard.name, copies[number], results[number], rules) for number in touched]
    kept, texts = list(results), list[str]()
    for number, (result, beginnings) in zip(touched, parts.spread(_without, tasks, workers, advance), strict=True):
        size = int(np.delete(tables[number][:, 0], copies[number]).sum())
        kept[number] = result._replace(num_text_bytes=size)
        texts += beginnings
    return kept, texts


def _without(
    prefix: Path, dropped: np.ndarray, result: parts.PartResult, rules: parts.Rules, advance: Callable[[int], None]
) -> tuple[parts.PartResult, list[str]]:
    """Write PREFIX.kept without some documents. Returns it, and the beginnings of the first documents left out."""
    used = parts.load(rules.tokenizer_path, rules.eos)
    whole = IndexedDataset(prefix)
    target = Path(f"{prefix}.kept")
    writer, masked = IndexedWriter(target, used.vocab_size), masks.MaskWriter()
    path = Path(f"{prefix}{masks.SUFFIX}")
    marks = masks.ShardMasks(path, whole.num_tokens) if result.shard.masks_bytes else None
    absent = set(dropped.tolist())
    for document in range(whole.num_documents):
        if document not in absent:
            start, stop = whole.offsets(document, document + 1).tolist()
            if marks:
                metadata = int(marks.prefixes(start, stop).sum())
                masked.add_document(writer.num_tokens, metadata, marks.masked(start, stop))
            writer.add_document(whole.tokens(start, stop))
    writer.finish()
    masked.finish(Path(f"{target}{masks.SUFFIX}"))
    counts = (writer.num_documents, writer.num_tokens, masked.num_prefix_tokens, masked.num_masked_tokens)
    shard = describe_shard(target, *counts)
    listed = (whole.document(document)[: parts.LISTED_TOKENS].tolist() for document in dropped[: parts.LISTED])
    beginnings = [used.tokenizer.decode(ids) for ids in listed]
    return result._replace(shard=shard, max_token_id=writer.max_token_id), beginnings
