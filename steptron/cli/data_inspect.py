"""`steptron data inspect` and `data verify`.

inspect: shards → a table, and for each source its origin, lengths and samples. verify: shards → checksums compared.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from steptron.errors import DataError, typed

if TYPE_CHECKING:
    from steptron.data.readers import Unread
    from steptron.data.source import ShardedSource, SourceInfo

SHOWN = 10
"""The number of inputs that were not read and are printed. source.json lists all."""
_SAMPLE_TOKENS = 60
_BAR = 40


def add_parsers(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `inspect` and `verify`."""
    inspect = actions.add_parser(
        "inspect",
        help="show the sources in a folder: counts, lengths, what was not read, samples",
        description="Show the sources in a folder: documents and tokens, the end of a document, what was not read, how "
        "long the documents are, and the beginnings of some.",
        epilog="example: steptron data inspect data/demo --samples 3",
    )
    inspect.add_argument("folder", metavar="DIR", type=Path, help="a source, or the --out folder of a build")
    inspect.add_argument(
        "--samples",
        metavar="N",
        type=int,
        default=1,
        help="number of documents of each source whose beginning is shown, evenly spaced (default: 1, the first)",
    )
    verify = actions.add_parser(
        "verify",
        help="compare every file with its checksum",
        description="Compare every file of the sources in a folder with the checksum in source.json.",
        epilog="example: steptron data verify data/demo",
    )
    verify.add_argument("folder", metavar="DIR", type=Path, help="a source, or the --out folder of a build")


def inspect(args: argparse.Namespace) -> int:
    """Print the table and the details of each source. Returns the exit code."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if args.samples < 0:
        raise DataError(f"--samples={args.samples} must be at least 0")
    headings = ("source", "documents", "tokens", "shards", "tokens/document", "bytes/token", "vocabulary")
    table = Table(*headings, box=box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    sources = _sources(args.folder)
    for source in sources:
        info = source.info
        table.add_row(
            source.folder.name,
            f"{info.num_documents:,}",
            f"{info.num_tokens:,}",
            f"{len(info.shards):,}",
            f"{info.num_tokens / info.num_documents:,.1f}",
            f"{info.bytes_per_token:.2f}" if info.num_text_bytes else "unknown",
            f"{info.vocab_size:,}",
        )
    Console(width=max(Console().width, 120)).print(table)
    for source in sources:
        for line in (*_origin(source), *_masks(source.info), *_lengths(source), *_samples(source, args.samples)):
            print(line)
    print(f"sizes match; compare the checksums with {typed('data', 'verify', args.folder)}")
    return 0


def verify(args: argparse.Namespace) -> int:
    """Compare the checksums. Returns the exit code."""
    from steptron.cli.bars import bars

    for source in _sources(args.folder):
        with bars() as progress:
            progress.begin(f"checksums of {source.folder.name}", source.num_file_bytes)
            for num_bytes in source.verify():
                progress.advance(num_bytes)
        print(f"{source.folder}: {source.num_files:,} files, checksums match")
    return 0


def left_out_lines(info: "SourceInfo", folder: Path) -> list[str]:
    """Return the lines that say what of the input is not in the source: unread, or dropped by a filter."""
    from steptron.data.source import DROPPED_NAME, INFO_NAME

    dropped, listed = folder / DROPPED_NAME, folder / INFO_NAME
    lines = [
        f"{count:,} documents were dropped as {reason} (some are in {dropped})"
        for reason, count in info.dropped.items()
        if count
    ]
    if info.unread:
        lines += [f"{len(info.unread):,} inputs were not read (all are listed in {listed}):", *some(info.unread)]
    return lines


def some(unread: "Sequence[Unread]") -> list[str]:
    """Return a line for each of the first inputs that were not read."""
    more = [f"  and {len(unread) - SHOWN:,} more"] if len(unread) > SHOWN else []
    return [f"  {place}" for place in unread[:SHOWN]] + more


def _sources(folder: Path) -> "list[ShardedSource]":
    """Return the sources of a folder. Raises DataError if a tokenizer beside them is not theirs."""
    from steptron.data.source import ShardedSource, source_folders
    from steptron.data.tokenizer import tokenizer_hash

    sources = [ShardedSource(found) for found in source_folders(folder)]
    for source in sources:
        path = source.folder.parent / "tokenizer.json"
        if path.is_file() and tokenizer_hash(path) != source.info.tokenizer_hash:
            raise DataError(
                f"{source.folder} was built with tokenizer {source.info.tokenizer_hash}, "
                f"and {path} is {tokenizer_hash(path)}; restore the tokenizer.json it was built with, or build it again"
            )
    return sources


def _origin(source: "ShardedSource") -> list[str]:
    info = source.info
    end = f"documents end with {info.eos or 'the token'} (id {info.eos_id})"
    left_out = (f"  {line}" for line in left_out_lines(info, source.folder))
    return [f"{source.folder.name}: from {info.spec}; {end}", *left_out]


def _masks(info: "SourceInfo") -> list[str]:
    """Return the shares of tokens that are metadata and that are masked, if there are any."""
    shares = [("metadata prefixes", info.num_prefix_tokens), ("masked, never a target", info.num_masked_tokens)]
    return [f"  {count:,} tokens ({count / info.num_tokens:.1%}) are {kind}" for kind, count in shares if count]


def _lengths(source: "ShardedSource") -> list[str]:
    """Return a histogram of the documents by length, as text. The bars are shares of the tokens."""
    from steptron.data.histogram import histogram

    lines = [f"  {'tokens in a document':>23} {'documents':>15} {'tokens':>19} {'share':>7}"]
    for low, high, num_documents, num_tokens in histogram(source.lengths()):
        share = num_tokens / source.num_tokens
        edges = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        line = f"  {edges:>23} {num_documents:>15,} {num_tokens:>19,} {share:>7.1%} {'#' * round(_BAR * share)}"
        lines.append(line.rstrip())
    return lines


def _samples(source: "ShardedSource", count: int) -> list[str]:
    """Return the beginnings of documents as text if the tokenizer lies beside the source, else as ids."""
    from tokenizers import Tokenizer

    path = source.folder.parent / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path)) if path.is_file() else None
    total, lines = source.info.num_documents, []
    for index in dict.fromkeys(total * sample // count for sample in range(count)):
        tokens = source.document(index)
        parts = []
        for kind, ids in _by_kind(
            tokens[:_SAMPLE_TOKENS].tolist(), *(one.tolist() for one in source.document_masks(index, _SAMPLE_TOKENS))
        ):
            text = repr(tokenizer.decode(ids, skip_special_tokens=False)) if tokenizer else f"{ids}"
            parts.append(f"{kind} {text}".lstrip())
        where = "" if tokenizer else f" (no {path})"
        more = " …" if len(tokens) > _SAMPLE_TOKENS else ""
        lines.append(f"  document {index:,} of {len(tokens):,} tokens: {' '.join(parts)}{where}{more}")
    return lines


def _by_kind(ids: list[int], prefix_L: Iterable[bool], masked_L: Iterable[bool]) -> Iterator[tuple[str, list[int]]]:
    """Yield the tokens of a document in runs, each with the word for its kind: metadata, masked, or none for others."""
    kinds = [
        "metadata" if prefix else "masked" if masked else "" for prefix, masked in zip(prefix_L, masked_L, strict=True)
    ]
    for kind, run in groupby(zip(kinds, ids, strict=True), key=lambda pair: pair[0]):
        yield kind, [token for _, token in run]
