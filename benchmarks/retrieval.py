"""Retrieval over distance: one small model after the first and after the last stage of a context curriculum.

    python benchmarks/retrieval.py [--ranks 2] [--folder DIR]

The task is made up. In a document each key has one value, drawn at random for it. So where a key comes again, its
value, the answer, can be told only by a model that finds the key's earlier place: a guess is right once in 32 times.
Keys, values and places are drawn anew in each document, so there is nothing to learn by heart. Documents of the first
stage are keys and values without anything between them, each key many times. In the longer ones most lines are filler
words, and a key comes as seldom as twice.

`steptron data build` makes sources of the text with a tokenizer of whole words, and `steptron train` trains a model of
0.1 M parameters on 512 → 4,096 → 16,384 tokens, with the rising RoPE base of the published curriculum. Then the
checkpoints at the ends of the first and of the last stage read the same new documents, in which each key comes twice.
An answer is right if it has the largest logit of all words. The tables show the share of right answers by length of the
document, and in the longest ones by the distance between both places of the key.

Goals: at the end of the run the share is at least 90 % at each distance above 8,192 tokens. At the end of the first
stage it is at least 90 % in new documents of that stage, and below 90 % at each distance above 8,192 tokens.
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
from typing import NamedTuple

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
FAR, GOAL = 8192, 0.9
"""Goals: a distance in tokens, and a share of right answers."""
EDGES = (0, 256, 512, 1024, 2048, 4096, 8192, 12288, 16384)
"""The borders of the distances that are counted together."""


class Form(NamedTuple):
    """The form of a document."""

    length: int
    """The number of its tokens, its end included."""
    line: int
    """The number of tokens of a line: filler, or filler that ends with a key and its value."""
    pairs: int
    """The number of keys."""
    uses: int
    """The number of times that each of them comes."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the run and its documents, which have its length."""

    forms: tuple[Form, ...]
    """Each document draws one."""
    steps: int
    batch_size: int
    """The number of sequences of a step, and of documents."""
    peak: float
    """The learning rate at the start."""
    end: float
    """The learning rate at the end."""
    theta: float
    """The RoPE base of the full layer."""
    warmup: int = 0
    """The length of the warm-up in tokens."""

    @property
    def seq_len(self) -> int:
        return self.forms[0].length

    @property
    def documents(self) -> int:
        return self.steps * self.batch_size


DENSE = Form(512, 2, 15, 17)
"""The first stage: pairs and nothing else. Each key comes so often that it is soon worth while to look back."""
STAGES = {
    "short": Stage(forms=(DENSE,), steps=600, batch_size=8, peak=1e-2, end=8e-3, theta=1e4, warmup=20_480),
    "middle": Stage(
        forms=(Form(4096, 8, 32, 8), Form(4096, 8, 128, 2)), steps=40, batch_size=2, peak=8e-3, end=5e-3, theta=1e6
    ),
    "long": Stage(
        forms=(Form(16384, 8, 128, 4), Form(16384, 8, 128, 2)), steps=16, batch_size=2, peak=5e-3, end=1e-3, theta=5e6
    ),
}
LONGEST = Form(16384, 8, 64, 2)
NEW = {
    DENSE: 8,
    Form(512, 8, 8, 2): 32,
    Form(1024, 8, 32, 2): 16,
    Form(2048, 8, 64, 2): 8,
    Form(4096, 8, 64, 2): 4,
    Form(8192, 8, 64, 2): 4,
    LONGEST: 8,
}
"""The new documents: how many there are of each form."""


def document(random: np.random.Generator, form: Form) -> np.ndarray:
    """Return the ids of a document."""
    length, line, pairs, uses = form
    lines = random.permutation((length - 1) // line)[: pairs * uses].reshape(uses, pairs)
    starts = lines * line + line - 2
    ids = np.resize(np.arange(len(FILLER)), length) + WORDS.index(FILLER[0])
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
        drawn = random.integers(len(stage.forms), size=stage.documents).tolist()
        made[name] = [document(random, stage.forms[form]) for form in drawn]
    made["new"] = [document(random, form) for form, count in NEW.items() for _ in range(count)]
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


def measure(checkpoint: Path, source: Path) -> dict[Form, np.ndarray]:
    """Return what `answered` returns about the new documents, by their form."""
    request = EvalRequest(
        path=checkpoint,
        data=(),
        sources=(source,),
        tokens=None,
        seq_len=LONGEST.length,
        micro_batch=1,
        text_field="text",
        eos=None,
        overrides=(),
    )
    documents, found = ShardedSource(source), {}
    forms = [form for form, count in NEW.items() for _ in range(count)]
    with open_network(plan_evaluation(request)) as (network, _):
        for index, form in enumerate(forms):
            tokens = documents.document(index).astype(np.int64)
            found.setdefault(form, []).append(answered(network, tokens))
    return {form: np.concatenate(rows) for form, rows in found.items()}


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


def show(found: dict[str, dict[Form, np.ndarray]]) -> list[bool]:
    """Print the tables, and return which goals are met. `found` has what `measure` returns by stage."""
    first, last = next(iter(STAGES)), list(STAGES)[-1]
    lengths = Table("tokens of the document", "queries", *found, title="right answers by length")
    for form in NEW:
        values = [f"{share(found[name][form]):.1%}" for name in found]
        kind = " without filler" if form == DENSE else ""
        lengths.add_row(f"{form.length:,}{kind}", f"{len(found[first][form]):,}", *values)
    distances = Table(
        "distance in tokens", "queries", *found, title=f"right answers in documents of {LONGEST.length:,} tokens"
    )
    met = [share(found[first][DENSE]) >= GOAL]
    for above, to in pairwise(EDGES):
        here = {name: share(at(of[LONGEST], above, to)) for name, of in found.items()}
        count = len(at(found[first][LONGEST], above, to))
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
