"""`steptron doctor [RECIPE]`: what this machine, or every host of a job, can run, as a table.

[Finding] of doctor/examine.py ──▶ rich table on rank 0, exit code 1 if something fails
"""

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steptron.doctor.finding import Finding

COLOURS = {"ok": "green", "note": "yellow", "failed": "bold red"}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "doctor",
        help="check this machine",
        description="What this machine can run, what is missing for the rest, and whether a recipe can run here. Under torchrun or "
        "srun it looks at every host, and compares their clocks. Exit code 1 if something that is needed is not as it must be.",
        epilog="examples: steptron doctor demo · torchrun --nnodes 2 … -m steptron doctor RECIPE · "
        "srun --nodes 2 --ntasks-per-node 1 python -m steptron doctor",
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="also check whether this recipe can run here")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="overrides of the recipe")


def run(args: argparse.Namespace) -> int:
    """Print the table. Returns 0, or 1 where something fails."""
    from steptron.doctor.examine import examine

    findings = examine(args.recipe, args.overrides, args.recipes)
    if os.environ.get("RANK", "0") == "0":
        show(findings)
    return 1 if any(finding.state == "failed" for finding in findings) else 0


def show(findings: Sequence["Finding"]) -> None:
    """Every finding with its fix, and in the last line what failed."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", "state", "what was found → what to do", title="steptron doctor", box=box.SIMPLE_HEAD)
    for finding in findings:
        state = Text(finding.state, style=COLOURS[finding.state])
        fix = f"\n→ {finding.fix}" if finding.fix else ""
        table.add_row(Text(finding.name), state, Text(finding.found + fix, overflow="fold"))
    failed = [finding.name for finding in findings if finding.state == "failed"]
    console = Console()
    console.print(table)
    console.print(f"failed: {', '.join(failed)}" if failed else "nothing that is needed is missing", markup=False)
