"""The `steptron` command: find the command's module, parse, run it, and turn errors into one line and an exit code.

    0 done · 1 failed · 2 user's error · 3 stopped by policy, or layout not proved · 75 stopped on a signal after saving
    76 the coming stage needs another number of ranks

Only the module of the requested command is imported, so that `--help` answers at once.
"""

import argparse
import gc
import os
import platform
import sys
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, NoReturn

from steptron import __version__
from steptron.cli.surroundings import check_launcher, rank, show_any_text
from steptron.errors import OtherRanks, RankLostError, SignalStop, SteptronError, nearest
from steptron.launcher.leave import leave_with
from steptron.launcher.other_ranks import tell_launcher, way_on

GRACE_S = 5.0
"""The seconds that ranks other than 0 wait for rank 0 before they report an error themselves."""


class Command(NamedTuple):
    """The module of a command, its line in `steptron --help`, and whether it computes with torch."""

    module: str
    help: str
    needs_torch: bool = False


COMMANDS = {
    "train": Command("train", "start a run from a recipe; under torchrun, run one rank of it", needs_torch=True),
    "resume": Command("resume", "continue a run from its newest complete checkpoint", needs_torch=True),
    "fork": Command("fork", "start a new run from a checkpoint of another, with its optimizer state", needs_torch=True),
    "show": Command(
        "show", "show steps, parameters, memory and layout of a recipe before running it", needs_torch=True
    ),
    "sweep": Command("sweep", "train one run for each combination of values"),
    "compare": Command("compare", "print and plot runs side by side"),
    "data": Command("data", "tokenise text to shards, and inspect them"),
    "inspect": Command("inspect", "show the contents of a run or a checkpoint, and whether it is complete"),
    "eval": Command("eval", "evaluate a checkpoint on text", needs_torch=True),
    "prove": Command("prove", "prove that a recipe's layout does not change what is computed", needs_torch=True),
    "export": Command("export", "write a checkpoint in the released Hugging Face format", needs_torch=True),
    "import": Command("export", "read weights in the released Hugging Face format", needs_torch=True),
    "monitor": Command("monitor", "watch runs: report, live page, metrics server, SQL, replay"),
    "doctor": Command("doctor", "check what this machine can run, and what to fix"),
}


class UsageError(SteptronError):
    """A command line that does not parse."""


class CommandParser(argparse.ArgumentParser):
    """An argument parser that raises `UsageError` and lists the options that every command takes."""

    def __init__(self, **options: object) -> None:
        super().__init__(**{"allow_abbrev": False, **options})  # pyright: ignore[reportArgumentType]
        add_common_options(self)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


class PrintVersions(argparse.Action):
    """The action of `--version`: print one line and raise `SystemExit`. torch is looked up, not imported."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        print(versions())
        parser.exit()


def versions() -> str:
    """Return the versions of steptron, torch and Python in one line."""
    # Imported here because --help and errors answer without it.
    from importlib import metadata

    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = "not installed"
    return f"steptron {__version__}, torch {torch}, Python {platform.python_version()}"


def warn_of_torch() -> None:
    """Print one line where the installed torch is outside of the releases that steptron's package was tried with."""
    from importlib import metadata

    from packaging.requirements import Requirement

    try:
        found = metadata.version("torch")
        needs = [Requirement(text) for text in metadata.requires("steptron") or []]
    except metadata.PackageNotFoundError:
        return  # run from a source tree that was never installed: there is no range to compare with
    tried = next(requirement for requirement in needs if requirement.name == "torch")
    if not tried.specifier.contains(found, prereleases=True):
        print(
            f"warning: torch {found} was not tried with steptron {__version__}; "
            f"if a command fails or numbers look wrong, install a release that was: pip install '{tried}'",
            file=sys.stderr,
        )


def entry() -> NoReturn:
    """Run the console script and end the process."""
    # Imports make some 600,000 objects that live for good. Python would look for garbage among them a thousand times,
    # which takes a tenth of the start of a command.
    gc.set_threshold(20_000)
    show_any_text()
    leave_with(lambda: main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run one command and return its exit code. `--help` and `--version` print and raise `SystemExit`."""
    with_traceback = "--traceback" in argv
    try:
        check_launcher()
        args = parse(argv)
        if COMMANDS[args.command].needs_torch and rank() == 0:
            warn_of_torch()
        return import_module(f"steptron.cli.{COMMANDS[args.command].module}").run(args)
    except OtherRanks as stop:
        if rank() == 0:
            tell_launcher(stop)
        report(stop, with_traceback, f"; {way_on(stop, argv)}")
        return stop.exit_code
    except SteptronError as error:
        report(error, with_traceback)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe (head, less) has gone: there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of a command, always with `command`, `recipes` (a `Path` or None) and `traceback`."""
    # The common options are parsed first, so that they may stand anywhere, also among overrides.
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_common_options(common)
    try:
        known, rest = common.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UsageError(f"{error}; see `steptron --help`") from error
    chosen = next((word for word in rest if not word.startswith("-")), None)
    if chosen is not None and chosen not in COMMANDS:
        raise UsageError(f"steptron has no command '{chosen}'; {nearest(chosen, COMMANDS)}")
    parser = CommandParser(
        prog="steptron",
        description="Pretraining of sparse mixture-of-experts language models.",
        epilog="Under torchrun: torchrun --nproc-per-node N -m steptron train RECIPE …",
    )
    parser.add_argument(
        "--version", action=PrintVersions, nargs=0, help="print the versions of steptron, torch and Python"
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    if chosen is None:
        for name, command in COMMANDS.items():
            subparsers.add_parser(name, help=command.help)
    else:
        import_module(f"steptron.cli.{COMMANDS[chosen].module}").add_parser(subparsers)
    args, left = parser.parse_known_args(rest)
    # argparse takes a list of words in one place. Overrides may also stand behind an option after the first argument.
    if left and (not hasattr(args, "overrides") or any(word.startswith("-") for word in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        args.overrides = [*args.overrides, *left]
    args.recipes, args.traceback = getattr(known, "recipes", None), getattr(known, "traceback", False)
    return args


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every command takes."""
    group = parser.add_argument_group("options of every command")
    group.add_argument(
        "--recipes",
        metavar="DIR",
        type=Path,
        default=argparse.SUPPRESS,
        help="recipes folder to use instead of the one that comes with steptron",
    )
    group.add_argument(
        "--traceback", action="store_true", default=argparse.SUPPRESS, help="show where an error was raised"
    )


def report(error: SteptronError, with_traceback: bool, more: str = "") -> None:
    """Print an error's line, with `more` at its end, once for all ranks.

    Rank 0 speaks first. The other ranks wait, because the launcher stops them as soon as rank 0 has ended. A rank that
    is still alive after the wait has met an error of its own and reports it. Without a launcher only rank 0 reports. If
    all ranks raise the same error, no other rank repeats it. `RankLostError` is already left to one rank.
    """
    ours = 0 if isinstance(error, RankLostError) else rank()
    prefix = "error"
    if ours != 0 and not getattr(error, "rank_local", False):
        if error.everywhere or "TORCHELASTIC_RUN_ID" not in os.environ:
            return
        time.sleep(GRACE_S + 0.5 * int(os.environ.get("LOCAL_RANK", "0")))
    if ours != 0:
        prefix = f"error on rank {ours}"
    if isinstance(error, SignalStop) or (isinstance(error, OtherRanks) and error.folder):
        prefix = prefix.replace("error", "stopped")
    if with_traceback:
        traceback.print_exception(error)
    print(f"{prefix}: {' '.join(str(error).split())}{more}", file=sys.stderr, flush=True)
