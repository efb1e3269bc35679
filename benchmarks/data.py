"""From shards to packed tensors: tokens a second on one core, memory, start and seek, ours beside other readers.

    python benchmarks/data.py [--rounds N] [--seconds S] [--peer PYTHON] [--folder DIR]

    steptron      `Loader`: two sources mixed 70 : 30, documents concatenated; borders of documents and weights in each
                  row. "best fit" is the same with whole documents in each row
    megatron      Megatron-core's `GPTDataset` on the same shards: tokens, labels, mask and positions
    mosaic        mosaicml-streaming: MDS files of rows that were cut to this length when they were written, shuffled.
                  They serve one length
    datasets      Hugging Face's `IterableDataset` over an Arrow file of documents, shuffled by a buffer, joined and cut

These three do less than ours: their rows are not a mixture, and know no borders of documents. The rows "…, borders" are
the same readers with the document of each token, as their user would add it: from the end-of-text tokens, or with
Megatron's `reset_position_ids`. "ratio" is to the best peer of both kinds, "like" to the best one with borders; the
goal is on "ratio".

Each reader is a process of its own on one core, with the allocator settings of a training run, and makes rows of the
next-token task as int64 torch tensors while it is its turn. All take turns in every round; a ratio is the median of
the rounds' ratios. A rate is by the processor time of the process with all its threads, because a machine may be busy.
Files are in the page cache. `start` is the wall time from the imports to the first row, with all that a reader prepares
(Megatron's indices are made anew). `seek` is the wall time to the first row of a far place: the median of 20 places, or
one place where it takes seconds. `memory` is the largest resident size of the whole process, of which "imports" was
there before the reader was opened.

The million documents are real files of random tokens, 300 on average (log-normal). The 100 million are a synthetic
index: real .idx files of 2 GB, and .bin files without blocks on the disk. Only readers of .bin/.idx can have them.

--peer names an interpreter that has the other packages (`make build/peers`); what it lacks is named in the
table.
"""

import argparse
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from unittest.mock import MagicMock

if TYPE_CHECKING:
    import torch

MILLION, MANY = 1_000_000, 100_000_000
LENGTHS = (4_096, 32_768, 131_072)
VOCAB, EOS = 32_768, 0
SHARES = {"a": 0.7, "b": 0.3}
OURS, PEERS = ("steptron", "best fit"), ("megatron", "mosaic", "datasets")
BORDERS = tuple(f"{name}, borders" for name in PEERS)
"""The peers, with the document of each token added as their users would do it. Ours always has it."""
MODULES = {"megatron": "megatron.core.datasets.gpt_dataset", "mosaic": "streaming", "datasets": "datasets"}
RATIO, START_S, SEEK_S, MEMORY = 3.0, 1.0, 0.010, 300e6
"""The goals: times the tokens a second of the best peer, seconds of start and seek, bytes."""
FAR = 20
"""The number of places that are sought."""


def main() -> int:
    """Print the table and the goals met; 1 where one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--peer", default=sys.executable, help="an interpreter that has the other packages")
    parser.add_argument("--folder", type=Path, help="where to keep the corpora (default: a temporary folder)")
    parser.add_argument("--serve", nargs=3, metavar=("NAME", "FOLDER", "T"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        name, folder, length = args.serve
        serve(name, Path(folder), int(length))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        root = args.folder or Path(temporary)
        return compare(root, args.peer, args.rounds, args.seconds)


def compare(root: Path, peers: str, rounds: int, seconds: float) -> int:
    """Print the tables and the goals met."""
    from data_corpus import make_corpus
    from rich.console import Console
    from rich.table import Table

    missing = {name: why for name in PEERS if (why := _lacks(peers, MODULES[name]))}
    known = [name for name in (*PEERS, *BORDERS) if _package(name) not in missing]
    goals: list[bool] = []
    for count in (MILLION, MANY):
        folder = root / f"{count}"
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            make_corpus(folder, {name: round(count * share) for name, share in SHARES.items()}, count < MANY)
        table = Table(title=f"{count:,} documents: shards → packed tensors on one core, median (smallest to largest)")
        for column in (
            "T",
            "reader",
            "million tokens/s",
            "ratio",
            "like",
            "start, s",
            "seek, ms",
            "memory, MB",
            "imports, MB",
        ):
            table.add_column(column, justify="right")
        for length in LENGTHS:
            others = [name for name in known if count == MILLION or _package(name) == "megatron"]
            names = [*OURS, *others]
            found = take_turns(folder, length, names, peers, rounds, seconds)
            best = _fastest(found, others)
            like = _fastest(found, [name for name in others if name in BORDERS])
            for name in names:
                row = found[name]
                ratios = [f"{_ratio(row, found[one]):.2f}" if one else "" for one in (best, like)]
                rates = [rate / 1e6 for rate in row["rates"]]
                speed = f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"
                costs = f"{row['start']:.2f}", f"{row['seek'] * 1e3:.1f}", f"{row['memory'] / 1e6:.0f}"
                table.add_row(f"{length:,}", name, speed, *ratios, *costs, f"{row['imports'] / 1e6:.0f}")
            ours = found["steptron"]
            goals += [_ratio(ours, found[best]) >= RATIO] if best else []
            goals += [ours["start"] <= START_S, ours["seek"] <= SEEK_S, ours["memory"] <= MEMORY]
            goals += [found["best fit"]["seek"] <= SEEK_S]
        Console(width=130).print(table)
    for name, why in missing.items():
        print(f"{name} is not in the table: {why}")
    print("ratio: to the best peer of the same length. goals: ", end="")
    print(f"{RATIO:g} × the best peer, start ≤ {START_S:g} s, seek ≤ {SEEK_S * 1e3:g} ms, memory ≤ {MEMORY / 1e6:g} MB")
    print(f"goals: {sum(goals)} of {len(goals)} met")
    return 0 if all(goals) else 1


def _package(name: str) -> str:
    """Return the reader of a row of the table."""
    return name.split(",")[0]


def _fastest(found: dict[str, dict], names: list[str]) -> str:
    return max(names, key=lambda name: statistics.median(found[name]["rates"]), default="")


def _ratio(ours: dict, theirs: dict) -> float:
    return statistics.median(a / b for a, b in zip(ours["rates"], theirs["rates"], strict=True))


def _lacks(python: str, module: str) -> str:
    """Return why an interpreter cannot import a module; empty if it can."""
    words = "import runpy, sys; runpy.run_path(sys.argv[1])['stand_in_for_torchvision'](); __import__(sys.argv[2])"
    done = subprocess.run([python, "-c", words, __file__, module], capture_output=True, text=True)
    return (done.stderr.strip().splitlines() or ["it does not import"])[-1] if done.returncode else ""


def take_turns(folder: Path, length: int, names: list[str], peers: str, rounds: int, seconds: float) -> dict[str, dict]:
    """Return the figures of each reader; all take turns in every round."""
    workers = {}
    for name in names:
        python = sys.executable if name in OURS else peers
        words = [python, __file__, "--serve", name, str(folder), str(length)]
        workers[name] = subprocess.Popen(
            words,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    found: dict[str, dict] = {name: {"rates": []} for name in names}
    for name in names:  # one after the other: they share the core
        found[name] |= _ask(workers[name], "start")
        print(f"{folder.name} documents, T = {length}: {name} starts in {found[name]['start']:.2f} s", file=sys.stderr)
    for number in range(rounds):
        for name in names if number % 2 else names[::-1]:
            found[name]["rates"].append(_ask(workers[name], f"rate {seconds}")["rate"])
    for name in names:
        found[name] |= _ask(workers[name], "memory")
        workers[name].communicate("")
    return found


def _ask(worker: subprocess.Popen, question: str) -> dict:
    """Return a worker's answer."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    assert worker.stderr is not None
    worker.stdin.write(question + "\n")
    worker.stdin.flush()
    for line in worker.stdout:
        if line.startswith("{"):  # other lines are what the packages print
            return json.loads(line)
    raise SystemExit(f"{worker.args} ended:\n{worker.stderr.read()}")


# ── one reader, in its own process ──


def serve(name: str, folder: Path, length: int) -> None:
    """Answer the questions on standard input, about one reader."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    libc = ctypes.CDLL(None)
    for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD: large arrays come from the heap, as in a training run
        libc.mallopt(option, 2**30)
    import torch

    torch.set_num_threads(1)
    open_reader = {
        "steptron": lambda: steptron(folder, length, "concatenate"),
        "best fit": lambda: steptron(folder, length, "best_fit"),
        "megatron": lambda: megatron(folder, length, name in BORDERS),
        "mosaic": lambda: mosaic(folder, length, name in BORDERS),
        "datasets": lambda: hugging_face(folder, length, name in BORDERS),
    }[_package(name)]
    rows, far = None, None
    for line in sys.stdin:
        question, *values = line.split()
        if question == "start":
            prepare, make = open_reader()
            prepare()
            imports = _resident()
            begun = time.perf_counter()
            rows, far = make()
            next(rows)
            answer = {"start": time.perf_counter() - begun, "imports": imports, "seek": statistics.median(far())}
        elif question == "rate":
            assert rows is not None
            tokens, begun = 0, time.process_time()
            while (taken := time.process_time() - begun) < float(values[0]):
                tokens += next(rows)
            answer = {"rate": tokens / taken}
        else:
            answer = {"memory": _peak()}
        print(json.dumps(answer), flush=True)


def _resident() -> int:
    """Return the resident size of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


Rows = Iterator[int]
"""Reads rows, and yields the number of their tokens."""
Reader = tuple[Callable[[], object], Callable[[], tuple[Rows, Callable[[], list[float]]]]]
"""Two steps of a reader: its imports; then its rows, and a function that returns the seconds of some seeks."""


def _peak() -> int:
    """Return the largest resident size that this process had, in bytes. getrusage would begin with that of the process
    that started it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def steptron(folder: Path, length: int, packing: Literal["concatenate", "best_fit"]) -> Reader:
    """Return our loader as training has it: a batch of several rows at a time."""
    from steptron.config.schema import DataConfig, LrConfig, SourceConfig, StageConfig
    from steptron.data.loader import Loader

    sources = {name: SourceConfig(path=str(folder / name)) for name in SHARES}
    data = DataConfig(sources=sources, tokenizer=str(folder / "tokenizer.json"))
    stage = StageConfig(tokens=10**15, seq_len=length, batch_size=1, mix=SHARES, lr=LrConfig(peak=1.0), packing=packing)
    size = max(1, 32_768 // length)

    def make() -> tuple[Rows, Callable[[], list[float]]]:
        loader = Loader(data, {"base": stage}, 1, 0, VOCAB)

        def rows() -> Rows:
            first = 0
            while True:
                loader.batch("base", range(first, first + size))
                first += size
                yield size * length

        def seek() -> list[float]:
            places = [10**6 + 987_654_321 * place % 10**9 for place in range(FAR)]
            return [_seconds(lambda place=place: loader.batch("base", [place])) for place in places]

        return rows(), seek

    return lambda: None, make


def megatron(folder: Path, length: int, borders: bool) -> Reader:
    """Return Megatron-core's dataset of the larger source; its index files are made anew."""
    import torch

    # pyright does not see the packages of the other environment.
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig  # pyright: ignore
    from megatron.core.datasets.indexed_dataset import IndexedDataset  # pyright: ignore
    from megatron.core.datasets.utils import Split  # pyright: ignore

    class Tokenizer:
        eod, pad, vocab_size = EOS, EOS, VOCAB
        unique_identifiers = {"name": "none"}  # noqa: RUF012

    def make() -> tuple[Rows, Callable[[], list[float]]]:
        import numpy as np

        prefix = str(folder / "a" / "shard-00000")
        config = GPTDatasetConfig(
            random_seed=1,
            sequence_length=length,
            blend=([prefix], None),
            split="100,0,0",
            tokenizer=Tokenizer(),
            reset_position_ids=borders,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            path_to_cache=tempfile.mkdtemp(),
        )
        indexed = IndexedDataset(prefix)
        documents = np.arange(len(indexed.document_indices) - 1, dtype=np.int32)
        dataset = GPTDataset(indexed, prefix, documents, None, Split.train, config)

        def rows() -> Rows:
            place, size = 0, max(1, 32_768 // length)
            while True:
                items = [dataset[(place + n) % len(dataset)] for n in range(size)]
                for key in items[0]:
                    torch.stack([item[key] for item in items])
                place += size
                yield size * length

        def seek() -> list[float]:
            return [_seconds(lambda p=p: dataset[p * len(dataset) // FAR]) for p in range(FAR)]

        return rows(), seek

    return lambda: None, make


def mosaic(folder: Path, length: int, borders: bool) -> Reader:
    """Return mosaicml-streaming's dataset; rows were cut to this length when the files were written."""
    import numpy as np
    import torch

    stand_in_for_torchvision()
    from streaming import MDSWriter, StreamingDataset  # pyright: ignore

    path = folder / f"mds-{length}"

    def prepare() -> None:
        if path.exists():
            return
        tokens = np.fromfile(folder / "a" / "shard-00000.bin", "<u2")
        with MDSWriter(out=str(path), columns={"tokens": f"ndarray:uint16:{length}"}) as writer:
            for start in range(0, len(tokens) - length, length):
                writer.write({"tokens": tokens[start : start + length]})

    def make() -> tuple[Rows, Callable[[], list[float]]]:
        dataset = StreamingDataset(local=str(path), shuffle=True, batch_size=1)

        def rows() -> Rows:
            size = max(1, 32_768 // length)
            while True:
                held = []
                for item in dataset:
                    held.append(torch.from_numpy(item["tokens"].astype(np.int64)))
                    if len(held) == size:
                        stacked(held, borders)
                        held = []
                        yield size * length

        def seek() -> list[float]:
            def far() -> None:
                state = {"epoch": 0, "sample_in_epoch": len(dataset) // 2}
                state |= {"num_canonical_nodes": 1, "shuffle_seed": 9176, "initial_physical_nodes": 1}
                dataset.load_state_dict(state)
                next(iter(dataset))

            return [_seconds(far)]

        return rows(), seek

    return prepare, make


def stand_in_for_torchvision() -> None:
    """Let streaming be imported without torchvision, which only its datasets of images use, and which needs the very
    torch that it was built for."""
    for name in ("", ".transforms", ".transforms.functional", ".datasets"):
        sys.modules["torchvision" + name] = MagicMock(__spec__=ModuleSpec("torchvision" + name, None))
    vars(sys.modules["torchvision.datasets"])["VisionDataset"] = type("VisionDataset", (), {})


def hugging_face(folder: Path, length: int, borders: bool) -> Reader:
    """Return an IterableDataset over Arrow files of documents, joined and cut."""
    import numpy as np
    import torch
    from datasets import Dataset, load_dataset

    path = folder / "arrow"

    def prepare() -> None:
        if path.exists():
            return
        import pyarrow as pa

        tokens = np.fromfile(folder / "a" / "shard-00000.bin", "<u2")
        ends = np.flatnonzero(tokens == EOS) + 1
        offsets = np.concatenate([[0], ends]).astype(np.int64)
        column = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(tokens[: ends[-1]]))
        Dataset(pa.table({"tokens": column})).to_parquet(str(path / "documents.parquet"))

    def stream():
        files = str(path / "documents.parquet")
        return load_dataset("parquet", data_files=files, split="train", streaming=True).with_format("numpy")

    def joined(dataset) -> Iterator[torch.Tensor]:
        held, count = [], 0
        for item in dataset:
            held.append(item["tokens"])
            count += len(held[-1])
            while count > length:
                flat = np.concatenate(held)
                yield torch.from_numpy(flat[: length + 1].astype(np.int64))
                held, count = [flat[length:]], count - length

    def make() -> tuple[Rows, Callable[[], list[float]]]:
        size = max(1, 32_768 // length)

        def rows() -> Rows:
            while True:
                held = []
                for row in joined(stream().shuffle(seed=1, buffer_size=1000)):
                    held.append(row)
                    if len(held) == size:
                        stacked(held, borders)
                        held = []
                        yield size * length

        def seek() -> list[float]:
            return [_seconds(lambda: next(joined(stream().skip(MILLION // 10))))]

        return rows(), seek

    return prepare, make


def stacked(rows: list["torch.Tensor"], borders: bool) -> None:
    """Make a batch of rows, and if asked for the document of each token, numbered from 0 in each row."""
    import torch

    tokens_BS = torch.stack(rows)
    if borders:
        documents_BS = torch.zeros(tokens_BS.shape, dtype=torch.int32)
        torch.cumsum(tokens_BS[:, :-1] == EOS, dim=1, dtype=torch.int32, out=documents_BS[:, 1:])


def _seconds(act: Callable[[], object]) -> float:
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


if __name__ == "__main__":
    sys.exit(main())
