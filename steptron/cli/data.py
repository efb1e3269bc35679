"""`steptron data` and its actions.

build: text → data/tokenize.py → shards. The actions that only read shards are in data_inspect.py.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from steptron.cli import data_inspect
from steptron.data.opening import shown
from steptron.errors import DataError

if TYPE_CHECKING:
    from steptron.data.remote import Cache
    from steptron.data.tokenize import Built

DEMO_VOCAB_SIZE = 4_096
VOCAB_SIZE = 32_768


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of the command, with its actions under it."""
    parser = subparsers.add_parser(
        "data",
        help="tokenise text, inspect shards",
        description="Tokenise text to shards, inspect them, and verify their checksums.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")
    _add_build(actions)
    _add_tokenizer(actions)
    _add_import(actions)
    data_inspect.add_parsers(actions)


def run(args: argparse.Namespace) -> int:
    """Run one action. Returns the exit code."""
    actions = {
        "build": _build,
        "tokenizer": _tokenizer,
        "import": _import,
        "inspect": data_inspect.inspect,
        "verify": data_inspect.verify,
    }
    return actions[args.action](args)


def _add_build(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    build = actions.add_parser(
        "build",
        help="tokenise text to shards",
        description="Tokenise documents to Megatron .bin/.idx shards, with a source.json that describes them.",
        epilog="examples: steptron data build demo --out data/demo · steptron data build 'books/**/*.txt' "
        "--out data/books --name books · steptron data build web.jsonl --out data/web --tokenizer tokenizer.json",
    )
    build.add_argument(
        "specs",
        metavar="SPEC",
        nargs="+",
        help="`demo` (prose and code of this Python's standard library), or files, folders and glob patterns of text, "
        "JSON lines (both also as gz, zst, bz2 or xz), Parquet and Arrow, folders of datasets (save_to_disk, MDS), and "
        "URLs of such files and folders (s3://, hf://datasets/, https:// …), or datasets:NAME[:SUBSET[:SPLIT]] of the "
        "Hugging Face Hub, streamed, or @FILE, a list of inputs, one per line; several become one source",
    )
    build.add_argument("--name", metavar="SOURCE", help="name of the source (default: from SPEC); demo names its own")
    _add_target(build, "if there is none, one is trained on this text alone")
    build.add_argument(
        "--vocab-size",
        metavar="N",
        type=int,
        help=f"vocabulary size of a new tokenizer (default: {DEMO_VOCAB_SIZE} for demo, else {VOCAB_SIZE})",
    )
    _add_reading(build)
    build.add_argument(
        "--metadata",
        metavar="FIELD|KEY=VALUE,…",
        action="append",
        default=[],
        help="begin each document with a line such as `type: code | language: python`, from fields of its record or "
        "values for the whole source; data.metadata_until says how long it is trained",
    )
    build.add_argument(
        "--mask-field",
        metavar="NAME",
        help="field with the spans of characters [[start, end], …] of the text that are no targets, such as prompts",
    )
    build.add_argument(
        "--drop-repeats",
        action="store_true",
        help="leave out documents in which 1 to 13 tokens stand 32 times in a row, count them and list some",
    )
    build.add_argument(
        "--drop-duplicates",
        metavar="exact|near",
        choices=("exact", "near"),
        help="keep only the first of equal documents (exact), or of similar ones too (near, by MinHash); count the "
        "others and list some",
    )
    build.add_argument(
        "--shard",
        metavar="I/N",
        help="build only every N-th part of the input, from part I on (0 to N-1), for processes side by side; the same "
        "command without --shard joins them",
    )
    build.add_argument(
        "--hold-out",
        metavar="FRACTION",
        type=float,
        default=0.0,
        help="write this share of the documents into a second source, SOURCE-held-out, for evaluation (default: 0)",
    )


def _add_target(parser: argparse.ArgumentParser, otherwise: str) -> None:
    """Add the options of what is written."""
    parser.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="folder for the tokenizer and its sources"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FILE|DIR|NAME",
        help="a tokenizer.json, a folder that holds one, or a Hugging Face model in the local cache (default: the one "
        f"in --out; {otherwise})",
    )
    parser.add_argument(
        "--eos",
        metavar="TOKEN",
        help="token that ends a document (default: the one special token with a usual name, see docs/data.md)",
    )
    parser.add_argument(
        "--workers", metavar="N", type=int, help="number of processes or threads (default: one per core)"
    )


def _add_reading(parser: argparse.ArgumentParser) -> None:
    """Add the options of reading documents."""
    parser.add_argument(
        "--text-field",
        metavar="NAME",
        default="text",
        help="field with the text; a.b is the field b of the object a (default: text)",
    )
    parser.add_argument(
        "--skip-bad",
        metavar="N",
        type=int,
        default=0,
        help="leave out up to N files and records that cannot be read or are empty, and list them in source.json "
        "(default: 0)",
    )
    parser.add_argument(
        "--cache",
        metavar="DIR",
        type=Path,
        default=Path("~/.cache/steptron"),
        help="folder for copies of files behind URLs, while they are read (default: ~/.cache/steptron)",
    )
    parser.add_argument(
        "--cache-size", metavar="BYTES", default="64G", help="most bytes of these copies, K, M, G or T (default: 64G)"
    )


def _add_tokenizer(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    tokenizer = actions.add_parser(
        "tokenizer",
        help="train one tokenizer on several inputs",
        description="Train a byte-level BPE tokenizer on a sample of several inputs, in given shares.",
        epilog="example: steptron data tokenizer web=0.7 'code/**/*.py=0.3' --out data/tokenizer.json "
        "--vocab-size 65536",
    )
    tokenizer.add_argument(
        "specs",
        metavar="SPEC[=WEIGHT]",
        nargs="+",
        help="an input as `data build` takes it, and its share of the text; either all have a weight or none has, and "
        "then their sizes decide",
    )
    tokenizer.add_argument("--out", metavar="FILE", type=Path, required=True, help="the tokenizer.json to write")
    tokenizer.add_argument("--vocab-size", metavar="N", type=int, required=True, help="number of tokens")
    _add_reading(tokenizer)


def _add_import(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    adopt = actions.add_parser(
        "import",
        help="make a source of existing shards, without a copy",
        description="Check shards that Megatron or datatrove wrote, and make a source that links to them.",
        epilog="example: steptron data import web_text_document --out data/mine --name web --tokenizer tokenizer.json",
    )
    adopt.add_argument(
        "shards",
        metavar="PREFIX",
        nargs="+",
        help="Megatron's PREFIX, PREFIX.bin or PREFIX.idx, or datatrove's NAME.ds",
    )
    adopt.add_argument("--name", metavar="SOURCE", help="name of the source (default: from PREFIX)")
    _add_target(adopt, "it must be the one that the shards were made with")


def _build(args: argparse.Namespace) -> int:
    from steptron.cli.bars import bars
    from steptron.data.fields import Fields, parse_metadata
    from steptron.data.tokenize import BuildRequest, build, build_parts
    from steptron.data.tokenizer import find

    workers, shard = _workers(args), _shard(args.shard)
    if not 0 <= args.hold_out < 1:
        raise DataError(f"--hold-out={args.hold_out} must be at least 0 and below 1: it is a share of the documents")
    _check_skip_bad(args)
    demo = args.specs == ["demo"]
    if demo and args.name:
        raise DataError(f"--name={args.name}: demo names its own sources, prose and code; leave --name out")
    if not demo and "demo" in args.specs and not Path("demo").exists():
        raise DataError("demo is two sources of its own: build it without other inputs")
    request = BuildRequest(
        specs=tuple(args.specs),
        out=args.out,
        name=args.name if demo else _name(args.specs, args.name),
        tokenizer=find(args.tokenizer) if args.tokenizer else None,
        vocab_size=args.vocab_size,
        default_vocab_size=DEMO_VOCAB_SIZE if demo else VOCAB_SIZE,
        eos=args.eos,
        fields=Fields(args.text_field, parse_metadata(args.metadata), args.mask_field),
        skip_bad=args.skip_bad,
        workers=workers,
        cache=_cache(args),
        hold_out=args.hold_out,
        drop_repeats=args.drop_repeats,
        drop_duplicates=args.drop_duplicates,
    )
    if shard:
        with bars() as progress:
            results = build_parts(request, *shard, progress)
        for folder, num_built, num_parts in results:
            print(
                f"{folder}: {num_built} of {num_parts} parts are done; join all with the same command without --shard"
            )
        return 0
    path = args.out / "tokenizer.json"
    if not args.tokenizer and not path.is_file():
        print(
            f"{path} is not there and no --tokenizer is given: one is trained on this text alone "
            "(for several sources, train it first: steptron data tokenizer)"
        )
    with bars() as progress:
        results = build(request, progress)
    _print_built(results, "built from the same text")
    return 0


def _tokenizer(args: argparse.Namespace) -> int:
    from steptron.atomic import atomic_write
    from steptron.cli.bars import bars
    from steptron.data.demo import demo_items
    from steptron.data.documents import check_unread, file_items
    from steptron.data.fields import Fields
    from steptron.data.readers import Item, Unread
    from steptron.data.tokenizer_training import train_on

    _check_skip_bad(args)
    if args.out.exists():
        raise DataError(f"--out={args.out} exists: remove it, or give another file")
    weights = _weights(args.specs)
    sources: dict[str, list[Item]] = {}
    unread: list[Unread] = []
    for spec in weights:
        if spec == "demo":
            sources[spec] = [item for items in demo_items().values() for item in items]
        else:
            sources[spec], missing = file_items([spec], Fields(args.text_field), _cache(args))
            unread += missing
    check_unread(unread, args.skip_bad)
    given = {spec: weight for spec, weight in weights.items() if weight is not None} or None
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(args.out, durable=True) as temporary, bars() as progress:
            taken, missing = train_on(sources, given, args.vocab_size, temporary, progress.begin, progress.advance)
            unread += missing
            check_unread(unread, args.skip_bad)
            if not all(taken.values()):
                empty = next(spec for spec, size in taken.items() if not size)
                raise DataError(f"{shown(empty)}: not one document with text there: leave it out, or give other files")
    except OSError as error:
        raise DataError(f"{args.out}: the training stopped, {error}; nothing was written") from error
    total = sum(taken.values())
    parts = ", ".join(f"{shown(spec)} {size:,} ({size / total:.1%})" for spec, size in taken.items())
    print(f"{args.out}: {args.vocab_size:,} tokens, trained on {total:,} bytes of text: {parts}")
    if unread:
        print(f"{len(unread):,} inputs were not read:", *data_inspect.some(unread), sep="\n")
    return 0


def _import(args: argparse.Namespace) -> int:
    from steptron.cli.bars import bars
    from steptron.data.shard_import import ImportRequest, import_shards
    from steptron.data.tokenizer import find

    request = ImportRequest(
        shards=tuple(args.shards),
        out=args.out,
        name=_name(args.shards, args.name),
        tokenizer=find(args.tokenizer) if args.tokenizer else None,
        eos=args.eos,
        workers=_workers(args),
    )
    with bars() as progress:
        built = import_shards(request, progress)
    _print_built([built], "imported from the same files")
    return 0


def _print_built(results: "Sequence[Built]", made: str) -> None:
    for folder, info, is_new in results:
        state = "" if is_new else f" (already {made})"
        print(
            f"{folder}: {info.num_tokens:,} tokens in {info.num_documents:,} documents, "
            f"{len(info.shards)} shards, vocabulary {info.vocab_size:,}, "
            f"documents end with {info.eos or '?'} (id {info.eos_id}){state}"
        )
        for line in data_inspect.left_out_lines(info, folder):
            print(line)


def _weights(words: list[str]) -> dict[str, float | None]:
    """Return the inputs with their weights, None where none is given. A file that is named like that is no weight."""
    weights: dict[str, float | None] = {}
    for word in words:
        spec, sign, weight = word.rpartition("=")
        if not sign or Path(word).exists():
            spec, weight = word, None
        if spec in weights:
            raise DataError(f"{shown(spec)} is given twice: give it once, with its whole weight")
        try:
            weights[spec] = None if weight is None else float(weight)
        except ValueError as error:
            raise DataError(f"{shown(word)}: the weight {weight!r} is not a number") from error
        if weight is not None and not 0 < float(weight) < float("inf"):
            raise DataError(f"{shown(word)}: the weight must be above 0 and finite")
    if None in weights.values() and any(weights.values()):
        without = next(spec for spec, weight in weights.items() if weight is None)
        raise DataError(f"{shown(without)} has no weight, and others have: give all of them one, or none")
    return weights


def _check_skip_bad(args: argparse.Namespace) -> None:
    if args.skip_bad < 0:
        raise DataError(f"--skip-bad={args.skip_bad} must be at least 0")


def _workers(args: argparse.Namespace) -> int:
    """Return --workers, or the number of cores."""
    from steptron.doctor.machine import cores

    if args.workers is not None and args.workers < 1:
        raise DataError(f"--workers={args.workers} must be at least 1")
    return args.workers or cores()


def _cache(args: argparse.Namespace) -> "Cache":
    from steptron.data.remote import Cache

    match = re.fullmatch(r"(\d+)([KMGT]?)", args.cache_size)
    if not match:
        raise DataError(f"--cache-size={args.cache_size} must be a number of bytes, such as 500M or 64G")
    return Cache(args.cache, int(match[1]) * 1000 ** " KMGT".index(match[2] or " "))


def _shard(text: str | None) -> tuple[int, int] | None:
    """Return I and N of I/N."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise DataError(f"--shard={text} must be I/N with I from 0 to N-1, such as 0/8 for the first of eight")
    return int(match[1]), int(match[2])


def _name(specs: list[str], name: str | None) -> str:
    """Return the name of the source, which is also the name of its folder."""
    if len(specs) > 1 and not name:
        raise DataError(f"{len(specs)} inputs become one source: give its name with --name")
    found = name or Path(specs[0].removeprefix("@")).stem
    if not re.fullmatch(r"\w[\w.-]*", found):
        given = f"--name={name}" if name else f"{shown(specs[0])}: {shown(found)!r}"
        raise DataError(f"{given} is not a name for a source (letters, digits, _ . -); give one with --name")
    return found
