"""The `steptron` command: finds the command's module, parses, runs it, and turns errors into one line and an exit code.

    0 done · 1 failed · 2 user's error · 3 training stopped by policy, or a layout not proved · 75 stopped on a signal after saving

Only the module of the command that was asked for is imported, so that `--help` answers at once.
"""

import argparse
import os
import platform
import sys
import time
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, NoReturn

from steptron import __version__
from steptron.cli.leave import leave_with
from steptron.errors import RankLostError, SignalStop, SteptronError

GRACE_S = 5.0
"""How long ranks other than 0 leave the word to rank 0 before they report an error themselves."""


class Command(NamedTuple):
    """Where a command lives, and its line in `steptron --help`."""

    module: str
    help: str


COMMANDS = {
    "train": Command("train", "start a run from a recipe; under torchrun it is one rank of it"),
    "resume": Command("resume", "continue a run from its newest complete checkpoint"),
    "data": Command("data", "tokenise text to shards, and look into them"),
    "inspect": Command("inspect", "what a run or a checkpoint holds, and whether it is whole"),
    "prove": Command("prove", "prove that a recipe's layout does not change what is computed"),
    "export": Command("export", "write a checkpoint in the released Hugging Face format"),
    "import": Command("export", "read weights in the released Hugging Face format"),
    "monitor": Command("monitor", "watch runs: report, live page, server, SQL"),
    "doctor": Command("doctor", "what this machine can run, and what is missing for the rest"),
}


class UsageError(SteptronError):
    """A command line that does not parse."""


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are `UsageError`s, and which lists the options that every command takes."""

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


def entry() -> NoReturn:
    """The console script."""
    leave_with(lambda: main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run one command. Returns the exit code; `--help` and `--version` print and raise `SystemExit`."""
    with_traceback = "--traceback" in argv
    try:
        args = parse(argv)
        return import_module(f"steptron.cli.{COMMANDS[args.command].module}").run(args)
    except SteptronError as error:
        report(error, with_traceback)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe (head, less) has gone: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command, with `command`, `recipes` (a `Path` or None) and `traceback` always among them."""
    # The common options are taken out first, so that they may stand anywhere, also among overrides.
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_common_options(common)
    try:
        known, rest = common.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UsageError(f"{error}; see `steptron --help`") from error
    chosen = next((word for word in rest if not word.startswith("-")), None)
    if chosen is not None and chosen not in COMMANDS:
        close = get_close_matches(chosen, COMMANDS, n=1)
        raise UsageError(
            f"steptron has no command '{chosen}'; {'nearest' if close else 'known'}: {', '.join(close or COMMANDS)}"
        )
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
    # argparse takes a list of words in one place; overrides may also stand behind an option that follows the first argument.
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
        help="recipes folder to use in place of the one that comes with steptron",
    )
    group.add_argument(
        "--traceback", action="store_true", default=argparse.SUPPRESS, help="show where an error was raised"
    )


def report(error: SteptronError, with_traceback: bool) -> None:
    """Print an error's line once for all ranks.

    Rank 0 speaks. The others leave it the time to: the launcher stops them as soon as it has ended. One that is still
    alive then has met an error of its own, which would go unheard, and reports it. Without a launcher only rank 0 does.
    What all ranks raise alike needs no second word. `RankLostError` has been left to one rank already.
    """
    rank = 0 if isinstance(error, RankLostError) else int(os.environ.get("RANK", "0"))
    prefix = "error"
    if rank != 0 and not getattr(error, "rank_local", False):
        if error.everywhere or "TORCHELASTIC_RUN_ID" not in os.environ:
            return
        time.sleep(GRACE_S + 0.5 * int(os.environ.get("LOCAL_RANK", "0")))
    if rank != 0:
        prefix = f"error on rank {rank}"
    if isinstance(error, SignalStop):
        prefix = prefix.replace("error", "stopped")
    if with_traceback:
        traceback.print_exception(error)
    print(f"{prefix}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
