"""Retrieval over distance: one small model after the first and after the last stage of a context curriculum.

    python benchmarks/retrieval.py [--ranks 2] [--folder DIR]

The task is made up. A document is lines of the same filler words; some lines end with a key and its value instead. A
key has one value in a document, drawn at random for it. So where a key comes again, its value, the answer, can be told
only by a model that finds the key's earlier place: a guess is right once in 32 times. Keys, values and places are drawn
anew in each document, so there is nothing to learn by heart.

`steptron data build` makes sources of the text with a tokenizer of whole words, and `steptron train` trains a model of
0.1 M parameters on 512 → 4,096 → 16,384 tokens, with the rising RoPE base of the published curriculum. Then the
checkpoints at the ends of the first and of the last stage read the same new documents, in which each key comes twice.
An answer is right if it has the largest logit of all words. The tables show the share of right answers by length of the
document, and in the longest ones by the distance between both places of the key.

Goals: at the end of the run the share is at least 90 % at each distance above 8,192 tokens. At the end of the first
stage it is at least 90 % in documents of that stage's length, and below 90 % at each distance above 8,192 tokens.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from steptron.checkpoint.manifest import read_manifest
from steptron.data.source import ShardedSource
from steptron.model.inputs import Inputs
from steptron.parallel.network import Network
from steptron.train.evaluate_checkpoint import EvalRequest, open_network, plan_evaluation

EOS = "<eos>"
FILLER = [f"f{i}" for i in range(8)]
KEYS = [f"k{i}" for i in range(128)]
VALUES = [f"v{i}" for i in range(32)]
WORDS = [EOS, *FILLER, *KEYS, *VALUES]
LINE = len(FILLER)
"""The number of tokens of a line."""
FAR, GOAL = 8192, 0.9
"""Goals: a distance in tokens, and a share of right answers."""
EDGES = (0, 256, 512, 1024, 2048, 4096, 8192, 12288, 16384)
"""The borders of the distances that are counted together."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the run and its documents, which have its length."""

    seq_len: int
    """The length of a sequence, and of a document, in tokens."""
    documents: int
    """The number of documents. Each is read once."""
    pairs: tuple[tuple[int, int], ...]
    """The numbers of pairs, and how often each of them comes, of which every document draws one."""
    batch_size: int
    """The number of sequences of a step."""
    peak: float
    """The learning rate at the start."""
    end: float
    """The learning rate at the end."""
    theta: float
    """The RoPE base of the full layer."""
    warmup: int = 0
    """The length of the warm-up in tokens."""


STAGES = {
    "short": Stage(
        seq_len=512, documents=8000, pairs=((8, 7),), batch_size=8, peak=1e-2, end=5e-3, theta=1e4, warmup=81920
    ),
    "middle": Stage(seq_len=4096, documents=80, pairs=((64, 2),), batch_size=2, peak=8e-3, end=5e-3, theta=1e6),
    "long": Stage(seq_len=16384, documents=24, pairs=((64, 2),), batch_size=2, peak=5e-3, end=1e-3, theta=5e6),
}
NEW = {512: (32, 8), 1024: (16, 32), 2048: (8, 64), 4096: (4, 64), 8192: (4, 64), 16384: (8, 64)}
"""The new documents by length: their number, and the pairs of each."""


def document(random: np.random.Generator, length: int, pairs: int, uses: int) -> np.ndarray:
    """Return the ids of a document of `length` tokens, its end included. It has `pairs` pairs, each `uses` times."""
    lines = random.permutation((length - 1) // LINE)[: pairs * uses].reshape(uses, pairs)
    starts = lines * LINE + LINE - 2
    ids = np.resize(np.arange(LINE), length) + WORDS.index(FILLER[0])
    ids[starts] = random.permutation(len(KEYS))[:pairs] + WORDS.index(KEYS[0])
    ids[starts + 1] = random.integers(len(VALUES), size=pairs) + WORDS.index(VALUES[0])
    ids[-1] = WORDS.index(EOS)
    return ids


def queries(tokens: np.ndarray) -> list[tuple[int, int]]:
    """Return each place in a document at which a key comes again, and its distance to the key's first place. The answer
    is the token behind it."""
    low, high = WORDS.index(KEYS[0]), WORDS.index(KEYS[-1])
    first: dict[int, int] = {}
    found = []
    for place in np.flatnonzero((tokens >= low) & (tokens <= high)).tolist():
        before = first.setdefault(int(tokens[place]), place)
        if before < place:
            found.append((place, place - before))
    return found


def write_corpus(folder: Path) -> None:
    """Build a source of each stage, and one of all new documents."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    random, words = np.random.default_rng(0), np.array(WORDS)
    made: dict[str, list[np.ndarray]] = {}
    for name, stage in STAGES.items():
        drawn = random.choice(stage.pairs, size=stage.documents)
        made[name] = [document(random, stage.seq_len, pairs, uses) for pairs, uses in drawn]
    made["new"] = [document(random, length, n, 2) for length, (count, n) in NEW.items() for _ in range(count)]
    for name, documents in made.items():
        lines = [json.dumps({"text": " ".join(words[ids[:-1]])}) for ids in documents]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        build = ["data", "build", folder / f"{name}.jsonl", "--out", folder, "--name", name]
        steptron(*build, "--tokenizer", folder / "tokenizer.json", "--eos", EOS)


def steptron(*words: object, ranks: int = 1) -> None:
    """Run a command. Raises CalledProcessError if it fails."""
    launcher = ["-m", "steptron.launcher.torchrun", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "steptron", *map(str, words)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def write_recipe(folder: Path, ranks: int) -> Path:
    """Write the recipe of the run, and return its path."""
    model = {
        "vocab_size": len(WORDS),
        "hidden_size": 64,
        "num_layers": 2,
        "layer_pattern": "SF",
        "head_dim": 32,
        "full": {"num_heads": 1, "num_kv_heads": 1, "rotary_share": 0.5},
        "sliding": {"num_heads": 2, "num_kv_heads": 1, "rotary_share": 1.0, "window": 4},
        "num_dense_layers": 1,
        "ffn_size": 64,
        "moe": {"num_experts": 4, "top_k": 1, "ffn_size": 32, "shared_ffn_size": 32},
        "max_positions": max(stage.seq_len for stage in STAGES.values()),
    }
    stages = {
        name: {
            "tokens": stage.documents * stage.seq_len,
            "seq_len": stage.seq_len,
            "batch_size": stage.batch_size,
            "micro_batch": stage.batch_size // ranks if stage.seq_len < 1024 else 1,
            "packing": "best_fit",
            "mix": {name: 1.0},
            "lr": {"kind": "cosine", "peak": stage.peak, "end": stage.end, "warmup": stage.warmup},
            "rope_theta_full": stage.theta,
            "balance": {"bias_rate": 1e-3},
        }
        for name, stage in STAGES.items()
    }
    sources = {name: {"path": str(folder / name)} for name in STAGES}
    recipe = {
        "run": {"name": "retrieval", "dir": str(folder / "run"), "device": "cpu"},
        "model": model,
        "data": {"tokenizer": str(folder / "tokenizer.json"), "sources": sources},
        "stages": stages,
        "optim": {"weight_decay": 0.0},
        "monitor": {"level": "off", "wandb": {"mode": "disabled"}},
        "checkpoint": {"every": 100_000},
    }
    path = folder / "retrieval.yaml"
    path.write_text(json.dumps(recipe, indent=1))
    return path


def measure(checkpoint: Path, source: Path) -> dict[int, np.ndarray]:
    """Return what `answered` returns about all of the source's documents, by their length."""
    request = EvalRequest(
        path=checkpoint,
        data=(),
        sources=(source,),
        tokens=None,
        seq_len=max(NEW),
        micro_batch=1,
        text_field="text",
        eos=None,
        overrides=(),
    )
    documents, found = ShardedSource(source), {}
    with open_network(plan_evaluation(request)) as (network, _):
        for index in range(documents.num_documents):
            tokens = documents.document(index).astype(np.int64)
            found.setdefault(len(tokens), []).append(answered(network, tokens))
    return {length: np.concatenate(rows) for length, rows in found.items()}


def answered(network: Network, tokens: np.ndarray) -> np.ndarray:
    """Return a row for each query of a document: the distance, and 1 if the answer is right, else 0."""
    (logits_BTV,) = network.logits([Inputs.from_tokens(torch.from_numpy(tokens)[None])])
    said = logits_BTV[0].argmax(-1).numpy()
    return np.array([(distance, said[place] == tokens[place + 1]) for place, distance in queries(tokens)])


def at(found: np.ndarray, above: int, to: int) -> np.ndarray:
    """Return the rows of the queries at the distances (above, to]."""
    return found[(found[:, 0] > above) & (found[:, 0] <= to)]


def share(found: np.ndarray) -> float:
    """Return the share of right answers, NaN without queries."""
    return float(found[:, 1].mean()) if len(found) else math.nan


def show(found: dict[str, dict[int, np.ndarray]]) -> list[bool]:
    """Print the tables, and return which goals are met. `found` has what `measure` returns by stage and length."""
    first, last = next(iter(STAGES)), list(STAGES)[-1]
    lengths = Table("tokens of the document", "queries", *found, title="right answers by length")
    for length in NEW:
        values = [f"{share(found[name][length]):.1%}" for name in found]
        lengths.add_row(f"{length:,}", f"{len(found[first][length]):,}", *values)
    longest = max(NEW)
    distances = Table(
        "distance in tokens", "queries", *found, title=f"right answers in documents of {longest:,} tokens"
    )
    met = [share(found[first][STAGES[first].seq_len]) >= GOAL]
    for above, to in pairwise(EDGES):
        here = {name: share(at(of[longest], above, to)) for name, of in found.items()}
        count = len(at(found[first][longest], above, to))
        distances.add_row(f"{above + 1:,} to {to:,}", f"{count:,}", *(f"{value:.1%}" for value in here.values()))
        if above >= FAR:
            met += [here[last] >= GOAL, here[first] < GOAL]
    for table in (lengths, distances):
        for column in table.columns:
            column.justify = "right"
        Console().print(table)
    return met


def run(folder: Path, ranks: int) -> list[bool]:
    """Build the text, train, measure. Returns which goals are met."""
    start = time.perf_counter()
    write_corpus(folder)
    built = time.perf_counter()
    steptron("train", write_recipe(folder, ranks), ranks=ranks)
    trained = time.perf_counter()
    found = {}
    for checkpoint in sorted((folder / "run" / "checkpoints").glob("step-*")):
        name = read_manifest(checkpoint).counters["stage"]
        if name in (next(iter(STAGES)), list(STAGES)[-1]):
            found[name] = measure(checkpoint, folder / "new")
    met = show(found)
    measured = time.perf_counter()
    print(f"text {built - start:.0f} s, training {trained - built:.0f} s, measuring {measured - trained:.0f} s")
    return met


def main() -> int:
    """Print the tables and the goals that are met. Returns 1 if one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ranks", type=int, default=2, choices=(1, 2), help="number of processes that train (default: 2)"
    )
    parser.add_argument("--folder", type=Path, help="an empty folder for text and run (default: a temporary one)")
    args = parser.parse_args()
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
        met = run(args.folder, args.ranks)
    else:
        with tempfile.TemporaryDirectory() as folder:
            met = run(Path(folder), args.ranks)
    print(f"goals: {sum(met)} of {len(met)} met")
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
