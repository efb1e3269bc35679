"""`steptron data build` and `data inspect`.

build: text → data/tokenize.py → shards. inspect: shards → data/source.py → a table.
"""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from steptron.data.opening import shown
from steptron.errors import DataError

if TYPE_CHECKING:
    from steptron.data.source import ShardedSource
    from steptron.data.tokenize import BuildReporter

DEMO_VOCAB_SIZE = 4_096
VOCAB_SIZE = 32_768
_SHOWN = 10
"""The number of inputs that were not read and are printed. source.json lists all."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of the command, with `build` and `inspect` under it."""
    parser = subparsers.add_parser(
        "data", help="tokenise text, inspect shards", description="Tokenise text to shards, and inspect them."
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")
    _add_build(actions)
    inspect = actions.add_parser(
        "inspect",
        help="list and check the sources in a folder",
        description="List the sources in a folder, verify the checksums of their files, and show the first tokens.",
        epilog="example: steptron data inspect data/demo",
    )
    inspect.add_argument("folder", metavar="DIR", type=Path, help="a source, or the --out folder of a build")
    inspect.add_argument("--no-checksums", action="store_true", help="check sizes only; do not read the whole shards")


def run(args: argparse.Namespace) -> int:
    """Build or inspect. Returns the exit code."""
    return _build(args) if args.action == "build" else _inspect(args)


def _add_build(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    build = actions.add_parser(
        "build",
        help="tokenise text to shards",
        description="Tokenise documents to Megatron .bin/.idx shards, with a source.json that describes them.",
        epilog="examples: steptron data build demo --out data/demo · steptron data build 'books/**/*.txt' "
        "--out data/books --name books · steptron data build web.jsonl --out data/web --tokenizer tokenizer.json",
    )
    build.add_argument(
        "spec",
        metavar="NAME|SPEC",
        help="`demo` (prose and code of this Python's standard library), or a file, folder or glob pattern of text, "
        "JSON lines (both also as gz, zst, bz2 or xz), Parquet or Arrow, or a folder written by save_to_disk of "
        "datasets",
    )
    build.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="folder for the tokenizer and its sources"
    )
    build.add_argument("--name", metavar="SOURCE", help="name of the source (default: from SPEC); demo names its own")
    build.add_argument(
        "--tokenizer", metavar="FILE", type=Path, help="a tokenizer.json (default: the one in DIR, else train one)"
    )
    build.add_argument(
        "--vocab-size",
        metavar="N",
        type=int,
        help=f"vocabulary size of a new tokenizer (default: {DEMO_VOCAB_SIZE} for demo, else {VOCAB_SIZE})",
    )
    build.add_argument(
        "--eos",
        metavar="TOKEN",
        help="token that ends a document (default: the one special token with a usual name, see docs/data.md)",
    )
    build.add_argument(
        "--text-field",
        metavar="NAME",
        default="text",
        help="field with the text; a.b is the field b of the object a (default: text)",
    )
    build.add_argument(
        "--skip-bad",
        metavar="N",
        type=int,
        default=0,
        help="leave out up to N files and records that cannot be read or are empty, and list them in source.json "
        "(default: 0)",
    )
    build.add_argument(
        "--hold-out",
        metavar="FRACTION",
        type=float,
        default=0.0,
        help="write this share of the documents into a second source, SOURCE-held-out, for evaluation (default: 0)",
    )
    build.add_argument("--workers", metavar="N", type=int, help="number of processes (default: one per core)")


def _build(args: argparse.Namespace) -> int:
    from rich.console import Console

    from steptron.data.source import INFO_NAME
    from steptron.data.tokenize import BuildRequest, build
    from steptron.doctor.machine import cores

    if args.workers is not None and args.workers < 1:
        raise DataError(f"--workers={args.workers} must be at least 1")
    if not 0 <= args.hold_out < 1:
        raise DataError(f"--hold-out={args.hold_out} must be at least 0 and below 1: it is a share of the documents")
    if args.skip_bad < 0:
        raise DataError(f"--skip-bad={args.skip_bad} must be at least 0")
    demo = args.spec == "demo"
    if demo and args.name:
        raise DataError(f"--name={args.name}: demo names its own sources, prose and code; leave --name out")
    request = BuildRequest(
        spec=args.spec,
        out=args.out,
        name=args.name if demo else _name(args.spec, args.name),
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        default_vocab_size=DEMO_VOCAB_SIZE if demo else VOCAB_SIZE,
        eos=args.eos,
        text_field=args.text_field,
        skip_bad=args.skip_bad,
        workers=args.workers or cores(),
        hold_out=args.hold_out,
    )
    console = Console(stderr=True)
    with _bar(console) as progress:
        results = build(request, progress)
    for folder, info, is_new in results:
        state = "" if is_new else " (already built from the same text)"
        print(
            f"{folder}: {info.num_tokens:,} tokens in {info.num_documents:,} documents, "
            f"{len(info.shards)} shards, vocabulary {info.vocab_size:,}, "
            f"documents end with {info.eos or '?'} (id {info.eos_id}){state}"
        )
        if info.unread:
            print(f"{folder}: {len(info.unread):,} inputs were not read (all are listed in {folder / INFO_NAME}):")
            for unread in info.unread[:_SHOWN]:
                print(f"  {unread}")
            if len(info.unread) > _SHOWN:
                print(f"  and {len(info.unread) - _SHOWN:,} more")
    return 0


def _name(spec: str, name: str | None) -> str:
    """Return the name of the source, which is also the name of its folder."""
    found = name or Path(spec).stem
    if not re.fullmatch(r"\w[\w.-]*", found):
        given = f"--name={name}" if name else f"{shown(spec)}: {shown(found)!r}"
        raise DataError(f"{given} is not a name for a source (letters, digits, _ . -); give one with --name")
    return found


@contextmanager
def _bar(console) -> Iterator["BuildReporter"]:
    """Show one progress bar per task, in bytes of text."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())

    class Bars:
        def begin(self, task: str, num_bytes: int) -> None:
            self.end()
            self.task = rich.add_task(task, total=num_bytes)

        def advance(self, num_bytes: int) -> None:
            rich.advance(self.task, num_bytes)

        def end(self) -> None:
            for task in rich.tasks:
                rich.update(task.id, completed=task.total)

    with RichProgress(*columns, console=console) as rich:
        bars = Bars()
        yield bars
        bars.end()


def _inspect(args: argparse.Namespace) -> int:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from steptron.data.source import ShardedSource, source_folders

    headings = ("source", "documents", "tokens", "shards", "tokens/document", "bytes/token", "vocabulary", "files")
    table = Table(*headings, box=box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    sources = [ShardedSource(folder) for folder in source_folders(args.folder)]
    console = Console(stderr=True)
    for source in sources:
        if not args.no_checksums:
            with _bar(console) as progress:
                progress.begin(f"checksums of {source.folder.name}", source.num_file_bytes)
                for num_bytes in source.verify():
                    progress.advance(num_bytes)
        info = source.info
        table.add_row(
            source.folder.name,
            f"{info.num_documents:,}",
            f"{info.num_tokens:,}",
            f"{len(info.shards):,}",
            f"{info.num_tokens / info.num_documents:,.1f}",
            f"{info.num_text_bytes / info.num_tokens:.2f}",
            f"{info.vocab_size:,}",
            "sizes match" if args.no_checksums else "checksums match",
        )
    Console(width=max(Console().width, 120)).print(table)
    for source in sources:
        print(f"{source.folder.name} begins: {_beginning(source)}")
    return 0


def _beginning(source: "ShardedSource") -> str:
    """Return the first tokens of a source as text if its tokenizer lies beside it, else as ids."""
    from tokenizers import Tokenizer

    from steptron.data.tokenizer import tokenizer_hash

    tokens, _ = source.read(0, min(40, source.num_tokens))
    path = source.folder.parent / "tokenizer.json"
    if not path.is_file():
        return f"{tokens.tolist()} (token ids, because there is no {path})"
    if tokenizer_hash(path) != source.info.tokenizer_hash:
        raise DataError(
            f"{source.folder} was built with tokenizer {source.info.tokenizer_hash}, "
            f"and {path} is {tokenizer_hash(path)}; restore the tokenizer.json it was built with, or build it again"
        )
    return repr(Tokenizer.from_file(str(path)).decode(tokens.tolist(), skip_special_tokens=False))
