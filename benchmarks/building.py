"""Tokens a second of `steptron data build` beside `datasets.map` with the same tokenizer, on two processes.

    python benchmarks/building.py [--rounds N] [--megabytes M] [--processes P]

The text is the source files of this Python's standard library and packages, one JSON line for each. Both read the same
file with the same tokenizer.json, a byte-level BPE that is trained on the text first:

    steptron      `steptron data build FILE --tokenizer … --workers P`: shards, their index, checksums and source.json
    datasets      `load_dataset("json")`, `map(batched=True, num_proc=P)` with the tokenizer as transformers' fast one,
                  an EOS behind each document, `save_to_disk`

Each run is a new process with an empty cache, and both take turns. A machine may be busy: the ratio is of the processor
time of the process and all its children; the wall time stands beside it.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

RATIO = 1.5
"""The goal: times the tokens by processor time of `datasets.map`."""
VOCAB = 16_384
NAMES = ("steptron", "datasets")


def main() -> int:
    """Print the table and the goal; 1 where it is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=30.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--map", nargs=3, metavar=("FOLDER", "OUT", "P"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.map:
        folder, out, processes = args.map
        map_with_datasets(Path(folder), Path(out), int(processes))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return compare(Path(folder), args.rounds, args.megabytes, args.processes)


def compare(folder: Path, rounds: int, megabytes: float, processes: int) -> int:
    """Print the table and the goal."""
    from rich.console import Console
    from rich.table import Table

    size = write_corpus(folder, megabytes)
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in NAMES}
    for number in range(rounds):
        for name in NAMES if number % 2 else NAMES[::-1]:
            found[name].append(run(name, folder, folder / f"{name}-{number}", processes))
    tokens = {one[2] for runs in found.values() for one in runs}
    assert len(tokens) == 1, f"both must make the same number of tokens: {tokens}"
    table = Table(title=f"building: {size / 1e6:.0f} MB of text, {tokens.pop():,} tokens, {processes} processes")
    for column in (
        "builder",
        "processor, s: median (smallest to largest)",
        "wall, s",
        "MB a processor second",
        "ratio",
    ):
        table.add_column(column, justify="right")
    for name, runs in found.items():
        cpu, wall = [one[0] for one in runs], [one[1] for one in runs]
        ratio = statistics.median(other[0] / one[0] for one, other in zip(runs, found["datasets"], strict=True))
        spread = f"{statistics.median(cpu):.1f} ({min(cpu):.1f} to {max(cpu):.1f})"
        rate = f"{size / 1e6 / statistics.median(cpu):.2f}"
        table.add_row(name, spread, f"{statistics.median(wall):.1f}", rate, f"{ratio:.2f}")
    Console(width=120).print(table)
    ours = statistics.median(b[0] / a[0] for a, b in zip(found["steptron"], found["datasets"], strict=True))
    print(f"goal: {RATIO:g} × `datasets.map`: {ours:.2f}, {'met' if ours >= RATIO else 'missed'}")
    return 0 if ours >= RATIO else 1


def write_corpus(folder: Path, megabytes: float) -> int:
    """Write text.jsonl and tokenizer.json, and return the bytes of the text."""
    from steptron.data.tokenizer import train

    texts, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if text and size < megabytes * 1e6:
            texts.append(text)
            size += len(text.encode())
    with (folder / "text.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    train(iter(texts[::4]), VOCAB, folder / "tokenizer.json")
    return size


def run(name: str, folder: Path, out: Path, processes: int) -> tuple[float, float, int]:
    """Return the processor seconds, the wall seconds and the tokens of one build."""
    text, tokenizer = folder / "text.jsonl", folder / "tokenizer.json"
    steptron = [sys.executable, "-m", "steptron", "data", "build", text, "--name", "text", "--tokenizer", tokenizer]
    words = {
        "steptron": [*steptron, "--workers", processes, "--out", out],
        "datasets": [sys.executable, __file__, "--map", folder, out, processes],
    }[name]
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        list(map(str, words)), env=os.environ | {"HF_HOME": f"{out}-cache"}, capture_output=True, text=True
    )
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{words} ended:\n{done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall, count_tokens(name, out)


def count_tokens(name: str, out: Path) -> int:
    """Return the number of tokens of a build."""
    if name == "steptron":
        return json.loads((out / "text" / "source.json").read_text())["num_tokens"]
    from datasets import Dataset

    column = Dataset.load_from_disk(str(out)).data.column("input_ids")
    return sum(len(chunk.flatten()) for chunk in column.chunks)


def map_with_datasets(folder: Path, out: Path, processes: int) -> None:
    """Tokenise text.jsonl as users of datasets do."""
    from datasets import load_dataset
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>")

    def encode(batch: dict) -> dict:
        rows = tokenizer(batch["text"], return_attention_mask=False, return_token_type_ids=False)["input_ids"]
        return {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in rows]}

    texts = load_dataset("json", data_files=str(folder / "text.jsonl"), split="train")
    tokens = texts.map(encode, batched=True, num_proc=processes, remove_columns=texts.column_names)
    tokens.save_to_disk(str(out), num_proc=processes)


if __name__ == "__main__":
    sys.exit(main())
