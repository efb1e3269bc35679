"""`steptron doctor [RECIPE]`: check this machine, or every host of a job, and show a table.

[Finding] of doctor/examine.py ──▶ rich table on rank 0, exit code 1 if something failed
"""

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steptron.doctor.finding import Finding

COLOURS = {"ok": "green", "note": "yellow", "failed": "bold red"}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of the command."""
    parser = subparsers.add_parser(
        "doctor",
        help="check this machine",
        description="Check what this machine can run, what is missing for the rest, and whether a recipe can run here. "
        "Under torchrun or srun, check every host and compare their clocks. "
        "Exits with code 1 if a required check failed.",
        epilog="examples: steptron doctor demo · torchrun --nnodes 2 … -m steptron doctor RECIPE · "
        "srun --nodes 2 --ntasks-per-node 1 python -m steptron doctor",
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="also check whether this recipe can run here")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="overrides of the recipe")


def run(args: argparse.Namespace) -> int:
    """Print the table. Returns 0, or 1 if a check failed."""
    from steptron.cli.tell import tell
    from steptron.doctor.examine import examine

    findings = examine(args.recipe, args.overrides, args.recipes, tell)
    if os.environ.get("RANK", "0") == "0":
        show(findings)
    return 1 if any(finding.state == "failed" for finding in findings) else 0


def show(findings: Sequence["Finding"]) -> None:
    """Print every finding with its fix, and the failed checks in the last line."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", "state", "finding → fix", title="steptron doctor", box=box.SIMPLE_HEAD)
    for finding in findings:
        state = Text(finding.state, style=COLOURS[finding.state])
        fix = f"\n→ {finding.fix}" if finding.fix else ""
        table.add_row(Text(finding.name), state, Text(finding.found + fix, overflow="fold"))
    failed = [finding.name for finding in findings if finding.state == "failed"]
    console = Console()
    console.print(table)
    console.print(f"failed: {', '.join(failed)}" if failed else "nothing required is missing", markup=False)
