"""`steptron sweep RECIPE key=a,b …`: one run of a recipe for each combination of values, in Hydra's sweep grammar.

    overrides ─► combinations ─► Planned: name, command ─┬─► one `steptron train --or-resume` after another ─► table
                                                         └─► --slurm: the script of a job array

The name of a run is that of the recipe and its values, so that the same command line continues a sweep: a run that is
finished is not repeated.
"""

import argparse
import hashlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from steptron.errors import SignalStop, SteptronError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

    from steptron.config.schema import Recipe

LEARNING = re.compile(r"(model|seed|precision|optim|data|stages\.[^.]+\.(?!tokens$))")
"""The keys that decide what a run has learnt. A finished run where they differ is not the one that a sweep wants."""
LONGEST = 100
"""The number of characters of a run's name beyond which it is cut, and gets a hash of its values."""
OR_RESUME = "--or-resume"
FORWARDED = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that a sweep passes on to its run. ^C on a terminal reaches both."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of the command."""
    parser = subparsers.add_parser(
        "sweep",
        help="train one run for each combination of values",
        description="Train one run of a recipe for each combination of the values, one after another, and print a "
        "table. A run that fails does not stop the others. The same command continues a sweep.",
        epilog="examples: steptron sweep demo stages.base.lr.peak=1e-3,3e-3 seed=0,1 · "
        "steptron sweep demo 'optim.clip_norm=choice(0.5,1)' 'seed=range(0,3)' --ranks 2 · "
        "steptron sweep demo seed=0,1,2 --slurm > array.sbatch",
    )
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="a name in recipes/pretrain/, such as demo, or a YAML file, such as ./demo.yaml",
    )
    parser.add_argument(
        "overrides",
        metavar="key=a,b",
        nargs="*",
        default=[],
        help="Hydra overrides; key=a,b, choice(…) and range(…) give several values",
    )
    parser.add_argument("--ranks", metavar="N", type=int, default=1, help="number of ranks of each run (default: 1)")
    parser.add_argument(
        "--slurm", action="store_true", help="print the script of a Slurm job array instead of training"
    )


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One run of a sweep."""

    name: str
    """The name of the run."""
    values: list[str]
    """The overrides that differ between the runs of the sweep."""
    words: list[str]
    """The arguments of `steptron` that start the run or continue it."""
    folder: Path
    """The run folder."""
    recipe: "Recipe | None"
    """The recipe, or None if it is wrong."""
    reason: str = ""
    """The reason why the recipe with these values cannot be trained. Empty if it can."""


def run(args: argparse.Namespace) -> int:
    """Train the runs, and print the table. Returns 0, 1 if a run failed, or 75 after a signal."""
    planned = plan(args.recipe, args.overrides, args.recipes)
    if args.slurm and args.ranks != 1:
        raise SteptronError(f"--ranks {args.ranks} is for this machine; an array takes RANKS_PER_NODE, or its GPUs")
    if args.slurm:
        print(array_script(planned), end="")
        return 0
    states, code = {}, 0
    for n, one in enumerate(planned):
        if state := state_before(one):
            states[one.name] = state
            continue
        print(f"run {n + 1} of {len(planned)}: {one.name}", flush=True)
        code = _train(one, args.ranks)
        states[one.name] = "finished" if code == 0 else f"exit code {code}"
        if code in (SignalStop.exit_code, -signal.SIGINT, 130):
            break
    _print_table(planned, states)
    if code in (SignalStop.exit_code, -signal.SIGINT, 130):
        return SignalStop.exit_code
    return 0 if all(state.startswith("finished") for state in states.values()) else 1


def plan(recipe: str, overrides: Sequence[str], recipes: Path | None) -> list[Planned]:
    """Return the runs of a sweep, in the order of its values.

    Raises `RecipeError` for an override that does not parse, and `SteptronError` if nothing has several values or if no
    run can be trained.
    """
    from steptron.config.overrides import parse
    from steptron.config.resolve import resolve
    from steptron.errors import RecipeError

    parsed = parse(overrides)
    swept = [n for n, override in enumerate(parsed) if override.is_sweep_override()]
    if not swept:
        raise SteptronError("sweep needs a key with several values, such as seed=0,1; for one run, use steptron train")
    keys = [str(parsed[n].key_or_group) for n in swept]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise SteptronError(f"{twice} is given several values twice; give all of them in one override")
    planned = []
    for values in product(*(_values(parsed[n]) for n in swept)):
        words = list(overrides)
        for n, value in zip(swept, values, strict=True):
            words[n] = value
        try:
            known = resolve(recipe, words, recipes)
        except RecipeError as error:
            planned.append(_refused(list(values), str(error)))
            continue
        name = known.run.name if "run.name" in keys else f"{known.run.name}-{_suffix(keys, values)}"
        folder = Path(f"{known.run.dir}-{_suffix(keys, values)}" if known.run.dir else f"runs/{name}")
        more = [f"run.name={_quoted(name)}", *([f"run.dir={_quoted(str(folder))}"] if known.run.dir else [])]
        if known.monitor.wandb.group is None and "WANDB_RUN_GROUP" not in os.environ:
            more.append(f"monitor.wandb.group={_quoted(f'{known.run.name}-sweep')}")
        options = [*(["--recipes", str(recipes)] if recipes else []), OR_RESUME]
        command = ["train", recipe, *words, *more, *options]
        made = replace(known, run=replace(known.run, name=name, dir=str(folder)))
        planned.append(Planned(name=name, values=list(values), words=command, folder=folder, recipe=made))
    if all(one.reason for one in planned):
        raise SteptronError(f"no run of the sweep can be trained; the first one: {planned[0].reason}")
    return planned


def state_before(one: Planned) -> str:
    """Return why the run is not trained: its recipe is wrong, or its folder has a finished run. Empty if it is to be
    trained."""
    from steptron.config.changes import changes
    from steptron.config.paths import absolute, load_run
    from steptron.errors import RecipeError
    from steptron.monitor.dashboard.comparison import read_run

    if one.recipe is None:
        return f"not started: {one.reason}"
    figures, _ = read_run(one.folder)
    if figures.state != "finished":
        return ""
    kept = load_run(one.folder)
    try:
        changed = changes(kept, absolute(one.recipe, kept=kept))
    except RecipeError as error:
        return f"not started: {error}"
    for key, (was, now) in changed.items():
        if LEARNING.match(key) and not (
            key.endswith(".num_groups") and now is None
        ):  # a run's folder has it written out
            return f"not started: the finished run there has {key}={was}; give another run.name"
    budget = sum(stage.tokens for stage in one.recipe.stages.values())
    return "finished before" if (figures.tokens or 0) >= budget else ""


def array_script(planned: Sequence[Planned]) -> str:
    """Return the script of a Slurm job array with one job for each run that can be trained."""
    runs = [one for one in planned if not one.reason]
    words = [[word for word in one.words[1:] if word != OR_RESUME] for one in runs]  # the job's script adds it
    commands = "\n".join(f"    {shlex.quote(shlex.join(of_one))}" for of_one in words)
    left_out = "".join(f"# Left out, {' '.join(one.values)}: {one.reason}\n" for one in planned if one.reason)
    return f"""#!/usr/bin/env bash
#SBATCH --job-name=sweep
#SBATCH --array=0-{len(runs) - 1}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log
#
# One run of a sweep in each job of the array, written by `steptron sweep --slurm`. Submit it in the repository:
#
#   sbatch --gpus-per-node 8 --time 24:00:00 array.sbatch
{left_out}set -euo pipefail

runs=(
{commands}
)
eval "set -- ${{runs[$SLURM_ARRAY_TASK_ID]}}"
root=${{STEPTRON_ROOT:-${{SLURM_SUBMIT_DIR:-.}}}}
source "$root/slurm/job.sh"
run_job pretrain RECIPE "$@"
"""


def _values(override: "Override") -> list[str]:
    """Return the overrides that a sweep of one key stands for."""
    from hydra.errors import HydraException

    try:
        return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
    except (HydraException, AssertionError) as error:
        raise SteptronError(
            f"{override.input_line}: a sweep takes lists of values, as in key=a,b, choice(a,b) or range(1,4)"
        ) from error


def _refused(values: list[str], reason: str) -> Planned:
    return Planned(name=" ".join(values), values=values, words=[], folder=Path(), recipe=None, reason=reason)


def _suffix(keys: Sequence[str], values: Sequence[str]) -> str:
    """Return the part of a run's name that tells its values: `peak-1e-3-seed-0`."""
    lasts = [key.rpartition(".")[2] for key in keys]
    short = [last if lasts.count(last) == 1 else key for key, last in zip(keys, lasts, strict=True)]
    plain = "-".join(f"{key}-{value.partition('=')[2]}" for key, value in zip(short, values, strict=True))
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-")
    if text == plain and len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]}-{hashlib.blake2b(plain.encode(), digest_size=4).hexdigest()}"


def _quoted(text: str) -> str:
    """Return a text as the value of an override."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _train(one: Planned, ranks: int) -> int:
    """Train a run to its end. Returns its exit code."""
    from steptron.config.layouts import ranks_of_stages

    launcher, environment = [], dict(os.environ)
    if ranks > 1 or (one.recipe and max(ranks_of_stages(one.recipe, ranks).values()) > 1):
        launcher = ["-m", "steptron.launcher.torchrun", "--standalone", "--nproc-per-node", str(ranks)]
        if "OMP_NUM_THREADS" not in environment:  # as launch/env.sh does
            from steptron.doctor.machine import cores
            from steptron.launcher.other_ranks import CORES_VARIABLE

            environment |= {"OMP_NUM_THREADS": str(max(1, cores() // ranks)), CORES_VARIABLE: str(cores())}
    process = subprocess.Popen([sys.executable, *launcher, "-m", "steptron", *one.words], env=environment)
    with _forwarding(process):
        return process.wait()


@contextmanager
def _forwarding(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass signals on to the run, which saves and ends."""
    before = {number: signal.signal(number, lambda n, _: process.send_signal(n)) for number in FORWARDED}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_table(planned: Sequence[Planned], states: dict[str, str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from steptron.monitor.dashboard.comparison import read_run

    table = Table("values", "state", "steps", "last loss", "folder", box=box.SIMPLE_HEAD)
    for one in planned:
        figures, _ = read_run(one.folder)
        state, loss = states.get(one.name, "not started"), figures.loss
        numbers = ("–" if figures.step is None else f"{figures.step:,}", "–" if loss is None else f"{loss:.4f}")
        if one.reason:
            numbers = ("–", "–")
        table.add_row(" ".join(one.values), state, *numbers, "" if one.reason else str(one.folder))
    Console().print(table, markup=False)
