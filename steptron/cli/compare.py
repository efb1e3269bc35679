"""`steptron compare RUN RUN…`: run folders → monitor/dashboard/comparison.py → tables, and a page with curves."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steptron.monitor.dashboard.comparison import Figures

NO_VALUE = "–"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of the command."""
    parser = subparsers.add_parser(
        "compare",
        help="print and plot runs side by side",
        description="Print state, steps, losses and speed of runs side by side, and the keys of their recipes that "
        "differ. Write a page with their curves: one file that needs only a browser.",
        epilog="example: steptron compare runs/demo runs/wide --out wide.html",
    )
    parser.add_argument("run_dirs", metavar="RUN", nargs="+", type=Path, help="folders of runs, such as runs/demo")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, default=Path("comparison.html"), help="the page (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the tables and write the page. Returns the exit code."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from steptron.monitor.dashboard import comparison

    for folder in args.run_dirs:
        comparison.check_run(folder)
    names, console = comparison.names_of(args.run_dirs), Console()
    table = Table("run", *HEADS, box=box.SIMPLE_HEAD)
    for name, folder in zip(names, args.run_dirs, strict=True):
        table.add_row(name, *cells(comparison.read_run(folder)[0]))
    console.print(table)
    if keys := comparison.differing(args.run_dirs):
        table = Table("key that differs", *names, box=box.SIMPLE_HEAD)
        for key, values in keys.items():
            table.add_row(key, *(NO_VALUE if value is None else str(value) for value in values))
        console.print(table)
    comparison.write_page(args.run_dirs, args.out)
    console.print(f"curves: {args.out}", markup=False, highlight=False, soft_wrap=True)
    return 0


HEADS = ("state", "steps", "tokens", "last loss", "lowest loss", "gradient norm", "tokens/s", "MFU")
"""The heads of the columns of `cells`."""


def cells(figures: "Figures") -> Sequence[str]:
    """Return the figures of a run as a row of the table."""

    def shown(value: float | None, form: str) -> str:
        return NO_VALUE if value is None else format(value, form)

    return (
        figures.state,
        shown(figures.step, ","),
        shown(figures.tokens, ",.0f"),
        shown(figures.loss, ".4f"),
        shown(figures.lowest_loss, ".4f"),
        shown(figures.grad_norm, ".3g"),
        shown(figures.tokens_per_second, ",.0f"),
        shown(figures.mfu, ".0%"),
    )
