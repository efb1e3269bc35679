"""Small runs through the command line: a process, and what the run left. Their recipes are in `tiny`."""

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from jaxtyping import config
from steptron.cli.main import main
from steptron.config.decode import encode
from steptron.config.schema import Recipe

from forks import run

Start = Callable[[list[str]], subprocess.CompletedProcess[str]]


def start_interpreter(words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command in a new interpreter, which imports everything itself."""
    return subprocess.run(words, capture_output=True, text=True)


def command(*arguments, ranks: int = 1) -> list[str]:
    """The command line of `steptron`, under torchrun for several ranks."""
    launcher = ["-m", "steptron.launcher.torchrun", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "steptron", *(str(a) for a in arguments)]


def steptron(
    *arguments, ranks: int = 1, code: int = 0, check_shapes: bool = False, start: Start = run
) -> subprocess.CompletedProcess:
    """Run the command line and expect an exit code: one rank in this process, several under torchrun, started by
    `start`.

    `check_shapes`: of each call of the maths, as `conftest.py` has it for all other tests. Runs make the same calls
    over and over."""
    words = command(*arguments, ranks=ranks)
    if ranks == 1:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), _shapes(checked=check_shapes):
            left_with = main([str(a) for a in arguments])
        done = subprocess.CompletedProcess(words, left_with, out.getvalue(), err.getvalue())
    else:
        done = start(words)
    assert done.returncode == code, f"{' '.join(words)} left with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


@contextmanager
def _shapes(checked: bool) -> Iterator[None]:
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", not checked)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", before)


def write_recipe(recipe: Recipe, path: Path) -> Path:
    """The recipe as a file that `steptron train` takes."""
    path.write_text(json.dumps(encode(recipe)))
    return path


def metrics(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def column(run_dir: Path, name: str) -> list:
    """One column of metrics.jsonl."""
    return [line[name] for line in metrics(run_dir)]


def ledger(run_dir: Path) -> list[dict]:
    """The lines of ledger.jsonl."""
    return [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]


def build_corpus(folder: Path) -> Path:
    """Folder with tokenizer.json and the sources `prose` and `code`, the same text."""
    lines = [json.dumps({"text": f"the fox {i} sees a slow dog under the {i % 7} house. " * 9}) for i in range(200)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    out, tokenizer = folder / "tokens", []
    for name in ("prose", "code"):
        steptron("data", "build", folder / "text.jsonl", "--out", out, "--name", name, "--vocab-size", 300, *tokenizer)
        tokenizer = ["--tokenizer", out / "tokenizer.json"]
    return out
