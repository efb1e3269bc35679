"""`steptron inspect RUN_DIR|CHECKPOINT`: show the progress of a run, and which of its checkpoints are complete."""

import argparse
import json
from pathlib import Path


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of the command."""
    parser = subparsers.add_parser(
        "inspect",
        help="show the contents of a run or a checkpoint",
        description="Show finished stages, tokens by source, checkpoints and whether they are complete, parameters and "
        "layout.",
        epilog="examples: steptron inspect runs/demo · steptron inspect runs/demo/checkpoints/step-00000100 --json",
    )
    parser.add_argument("path", metavar="RUN_DIR|CHECKPOINT", type=Path, help="a run's folder, or one checkpoint in it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the summary. Returns the exit code."""
    from steptron.train.inspect import print_summary, summarise

    summary = summarise(args.path)
    if args.json:
        print(json.dumps(summary, indent=1))
    else:
        print_summary(summary)
    return 0
