"""`steptron inspect RUN_DIR|CHECKPOINT`: where a run is, and which of its checkpoints are whole."""

import argparse
import json
from pathlib import Path


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "inspect",
        help="what a run or a checkpoint holds",
        description="Stages done, tokens by source, checkpoints and whether they are whole, parameters, layout.",
        epilog="examples: steptron inspect runs/demo · steptron inspect runs/demo/checkpoints/step-00000100 --json",
    )
    parser.add_argument("path", metavar="RUN_DIR|CHECKPOINT", type=Path, help="a run's folder, or one checkpoint in it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print what is there. Returns the exit code."""
    from steptron.train.summary import print_summary, summarise

    summary = summarise(args.path)
    if args.json:
        print(json.dumps(summary, indent=1))
    else:
        print_summary(summary)
    return 0
