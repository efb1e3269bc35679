"""Checkpoints across Pythons: each one trains, and each resumes and exports what every other has written.

    python benchmarks/pythons.py [--folder DIR] [PYTHON …]

PYTHON: an interpreter, or the `bin/python` of an environment that has steptron's packages. By default the newest of
each minor version from the oldest that pyproject.toml supports on, found on PATH and under pyenv. One without the
packages gets an environment in DIR, where it stays for the next run: several GB each, since pip takes PyTorch's CUDA
build on most Pythons.

A run of a small network ends after some steps. Every Python continues a copy of it under a larger budget and exports
the checkpoint that it ended with. Goals, for each pair: both commands succeed; the loss after the last step is within
1e-5 of what the writer itself gets; the exported files are the writer's own, byte by byte; neither command prints a
warning, nor did training.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
BOUND = 1e-5
"""Relative tolerance of a loss against the writer's own: PyTorch versions may differ between Pythons."""
STEPS, MORE = 4, 8
"""Steps of a run, and after it was resumed."""
STEP_TOKENS = 512
NETWORK = (
    "model.vocab_size=300 model.hidden_size=64 parallel.dense.dp_shard=1 precision=fp32 run.device=cpu "
    "monitor.wandb.mode=disabled checkpoint.every=4 ~stages.long ~stages.longer "
    "stages.base.ramp=[] stages.base.batch_size=4 stages.base.micro_batch=2 "
    "stages.base.lr.warmup=1024 stages.base.lr.decay=1024"
)


@dataclass(frozen=True, kw_only=True)
class Python:
    """An environment with steptron's packages."""

    path: Path
    name: str
    """Versions of Python and PyTorch."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of one Python reading another one's run."""

    error: str = ""
    loss: float = 0.0
    """After the last step."""
    export: str = ""
    """Checksum of the exported files."""
    warnings: tuple[str, ...] = ()


def main() -> int:
    """Print the table and the goals met; 1 where one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where environments are kept (default: a temporary folder)")
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", help="an interpreter or an environment's bin/python")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        found = args.pythons or interpreters()
        pythons = [environment(Path(python), (args.folder or work).absolute()) for python in found]
        corpus(pythons[0], work)
        trained = {writer.name: train(writer, work) for writer in pythons}
        results = {(a.name, b.name): read(a, b, work, trained[a.name]) for a in pythons for b in pythons}
    table = Table("written by", title="read by")
    problems = {pair: problem(result, results[pair[0], pair[0]]) for pair, result in results.items()}
    for python in pythons:
        table.add_column(python.name)
    for a in pythons:
        table.add_row(a.name, *("fails" if problems[a.name, b.name] else cell(a, b, results) for b in pythons))
    Console(width=30 * (1 + len(pythons))).print(table)
    for (writer, reader), why in problems.items():
        if why:
            print(f"written by {writer}, read by {reader}: {why}")
    met = sum(not p for p in problems.values())
    print(f"goals: {met} of {len(problems)} met (resumed within {BOUND}, exported bitwise, no warning)")
    return 0 if met == len(problems) else 1


def interpreters() -> list[str]:
    """Return the newest interpreter of each minor version that pyproject.toml supports."""
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=3.")
    found: dict[int, str] = {}
    for minor in range(int(oldest), int(oldest) + 20):
        name = f"python3.{minor}"
        pyenv = sorted(
            Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/{name}"), key=lambda p: int(p.parts[-3].split(".")[2])
        )
        if on_path := shutil.which(name):
            found[minor] = on_path
        if pyenv:
            found[minor] = str(pyenv[-1])
    return list(found.values())


def environment(python: Path, folder: Path) -> Python:
    """Return the interpreter with the packages, installed into an environment of its own where it lacks them."""
    versions = "import platform, torch, hydra; print('Python', platform.python_version(), '· torch', torch.__version__)"
    asked = run(python, "-c", versions)
    if asked.returncode:
        own = folder / python.name
        check(run(python, "-m", "venv", own))
        python = own / "bin" / "python"
        check(run(python, "-m", "pip", "install", "--quiet", "--editable", ROOT))
        asked = check(run(python, "-c", versions))
    return Python(path=python, name=asked.stdout.strip())


def run(python: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run an interpreter on this source, one thread."""
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(python), *map(str, arguments)], capture_output=True, text=True, env=variables)


def check(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """Return what succeeded. Raises `RuntimeError` with the last line of what failed."""
    if done.returncode:
        lines = (done.stderr + done.stdout).strip().splitlines() or [""]
        raise RuntimeError(f"{' '.join(done.args[1:5])} … exited with {done.returncode}: {lines[-1]}")
    return done


def steptron(python: Python, *arguments: object) -> list[str]:
    """Run a command; return the warnings that it printed. Raises `RuntimeError` where it fails."""
    done = check(run(python.path, "-m", "steptron", *arguments))
    return [line for line in done.stderr.splitlines() if re.search(r"\bWarning|\w+Warning", line)]


def corpus(python: Python, work: Path) -> None:
    """Tokenise one text twice, as the recipe's two sources."""
    lines = [json.dumps({"text": f"the fox {i} sees a slow dog under the {i % 7} house. " * 9}) for i in range(200)]
    (work / "text.jsonl").write_text("\n".join(lines))
    build = ("data", "build", work / "text.jsonl", "--out", work / "tokens")
    steptron(python, *build, "--name", "prose", "--vocab-size", 300)
    steptron(python, *build, "--name", "code", "--tokenizer", work / "tokens" / "tokenizer.json")


def train(writer: Python, work: Path) -> Result:
    """Train for some steps into the writer's folder; what it printed and where it failed."""
    data = {"tokenizer": "tokenizer.json", "sources.prose.path": "prose", "sources.code.path": "code"}
    words = [f"data.{key}={work / 'tokens' / value}" for key, value in data.items()]
    folder = work / writer.name
    try:
        warned = steptron(
            writer,
            "train",
            "demo",
            f"run.dir='{folder}'",
            f"stages.base.tokens={STEPS * STEP_TOKENS}",
            *words,
            *NETWORK.split(),
        )
    except RuntimeError as error:
        return Result(error=str(error))
    return Result(warnings=tuple(warned))


def read(writer: Python, reader: Python, work: Path, trained: Result) -> Result:
    """Resume a copy of the writer's run and export its checkpoint, both with the reader."""
    if trained.error:
        return trained
    copy, out = work / f"{writer.name} by {reader.name}", work / f"export of {writer.name} by {reader.name}"
    shutil.copytree(work / writer.name, copy)
    try:
        warned = steptron(reader, "export", "hf", copy, out)
        warned += steptron(
            reader,
            "resume",
            copy,
            *(f"stages.base.{key}={MORE * STEP_TOKENS}" for key in ("tokens", "schedule_tokens")),
        )
    except RuntimeError as error:
        return Result(error=str(error))
    last = json.loads((copy / "metrics.jsonl").read_text().splitlines()[-1])
    if last["step"] != MORE:
        return Result(error=f"resumed to step {last['step']}, not {MORE}")
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(out.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return Result(loss=last["total_loss"], export=digest.hexdigest(), warnings=(*trained.warnings, *warned))


def problem(result: Result, own: Result) -> str:
    """Return what is wrong with a reader's result beside the writer's own; an empty string where nothing is."""
    if result.error or own.error:
        return result.error or "nothing to compare with"
    if not abs(result.loss - own.loss) <= BOUND:
        return f"loss {result.loss} where the writer has {own.loss}"
    if result.export != own.export:
        return "another export than the writer's"
    return result.warnings[0] if result.warnings else ""


def cell(writer: Python, reader: Python, results: dict[tuple[str, str], Result]) -> str:
    """Return how near a reader's loss is to the writer's own."""
    difference = abs(results[writer.name, reader.name].loss - results[writer.name, writer.name].loss)
    return f"loss ± {difference:.0e}, export bitwise" if difference else "loss and export bitwise"


if __name__ == "__main__":
    sys.exit(main())
