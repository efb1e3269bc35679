"""Compare the shards and readers with the programs that define the formats.

python benchmarks/formats.py --peer PYTHON      PYTHON has megatron-core and mosaicml-streaming installed

Megatron-core's builder → `steptron data import` → our reader    the same documents
`steptron data build` → Megatron-core's reader                   the same documents
mosaicml-streaming's writer, compressed or not → our reader      the same texts
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer

from steptron.cli.main import main as steptron
from steptron.data.documents import file_items
from steptron.data.source import ShardedSource, read_info

WRITE_MEGATRON = """
import json, sys, numpy, torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
prefix, path, name = sys.argv[1:]
builder = IndexedDatasetBuilder(prefix + ".bin", dtype=getattr(numpy, name))
for document in json.load(open(path)):
    builder.add_document(torch.tensor([t for part in document for t in part]), [len(part) for part in document])
builder.finalize(prefix + ".idx")
"""
READ_MEGATRON = """
import json, sys
from megatron.core.datasets.indexed_dataset import IndexedDataset
dataset, documents = IndexedDataset(sys.argv[1]), []
for begin, end in zip(dataset.document_indices, dataset.document_indices[1:]):
    documents.append([int(token) for index in range(begin, end) for token in dataset[index]])
json.dump(documents, sys.stdout)
"""
WRITE_MDS = """
import json, sys
from unittest.mock import MagicMock
while True:
    try:
        from streaming.base.format.mds.writer import MDSWriter
        break
    except ModuleNotFoundError as error:  # what it needs for other things than writing
        sys.modules[error.name] = MagicMock()
out, path, compression = sys.argv[1:]
columns = {"id": "int", "text": "str", "extra": "bytes"}
with MDSWriter(out=out, columns=columns, compression=compression or None, size_limit=20_000) as writer:
    for number, text in enumerate(json.load(open(path))):
        writer.write({"id": number, "text": text, "extra": b"x" * (number % 5)})
"""


def peer(python: str, script: str, *words: object) -> str:
    """Run a script in the other interpreter and return what it prints."""
    done = subprocess.run([python, "-c", script, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{python} failed: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def texts(count: int) -> list[str]:
    rng = random.Random(0)
    words = "river stone über naïve 東京 def return <|endoftext|> light".split()
    return [" ".join(rng.choices(words, k=rng.randint(1, 200))) for _ in range(count)]


def documents_of(folder: Path) -> list[list[int]]:
    source = ShardedSource(folder)
    return [source.document(number).tolist() for number in range(source.info.num_documents)]


def adopted(folder: Path, python: str, tokenizer: Path, dtype: str) -> bool:
    """Return True if documents of several sequences that Megatron wrote come back from an imported source."""
    rng = random.Random(1)
    size = Tokenizer.from_file(str(tokenizer)).get_vocab_size()
    documents = [
        [[rng.randrange(1, size) for _ in range(rng.randint(1, 50))] for _ in range(rng.randint(1, 3))] + [[0]]
        for _ in range(500)
    ]
    (folder / "documents.json").write_text(json.dumps(documents))
    peer(python, WRITE_MEGATRON, folder / "megatron", folder / "documents.json", dtype)
    out = folder / f"imported-{dtype}"
    words = ["data", "import", folder / "megatron", "--out", out, "--name", "a", "--tokenizer", tokenizer]
    steptron([str(word) for word in words])
    return documents_of(out / "a") == [list(chain.from_iterable(document)) for document in documents]


def read_by_megatron(folder: Path, python: str) -> bool:
    """Return True if Megatron's reader finds the documents of a build in its shards."""
    info = read_info(folder)
    found = [json.loads(peer(python, READ_MEGATRON, folder / shard.name)) for shard in info.shards]
    return list(chain.from_iterable(found)) == documents_of(folder)


def read_mds(folder: Path, python: str, compression: str) -> bool:
    """Return True if the texts of an MDS dataset come back, also from several shards."""
    (folder / "texts.json").write_text(json.dumps(texts(300)))
    out = folder / f"mds-{compression or 'plain'}"
    peer(python, WRITE_MDS, out, folder / "texts.json", compression)
    items, unread = file_items([str(out)])
    found = [document for item in items for document in item.documents()]
    return len(items) > 2 and not unread and found == texts(300)


def run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Compare with the programs that define the formats.")
    parser.add_argument("--peer", required=True, help="a Python with megatron-core and mosaicml-streaming")
    python = parser.parse_args(argv).peer
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [json.dumps({"text": text}) for text in texts(2000)]
        (folder / "web.jsonl").write_text("\n".join(lines))
        words = ["data", "build", f"{folder}/web.jsonl", "--out", f"{folder}/out", "--vocab-size", "300"]
        steptron(words)
        goals = {"Megatron-core reads our shards": read_by_megatron(folder / "out" / "web", python)}
        for dtype in ("uint16", "int32"):
            found = adopted(folder, python, folder / "out" / "tokenizer.json", dtype)
            goals[f"we read Megatron-core's shards, {dtype}"] = found
        for compression in ("", "gz", "bz2"):
            goals[f"we read mosaicml-streaming's MDS, {compression or 'plain'}"] = read_mds(folder, python, compression)
    for goal, met in goals.items():
        print(f"{'met   ' if met else 'MISSED'} {goal}")
    print(f"goals: {sum(goals.values())} of {len(goals)} met")
    return int(not all(goals.values()))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
