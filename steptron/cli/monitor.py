"""`steptron monitor report RUN_DIR`: run folder → monitor/report.py → report.html."""

import argparse
from pathlib import Path


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser, with one sub-command a view."""
    parser = subparsers.add_parser(
        "monitor", help="the HTML report of a run", description="What a run did, to look at."
    )
    views = parser.add_subparsers(dest="view", required=True, metavar="VIEW", title="views")
    report = views.add_parser(
        "report",
        help="write RUN_DIR/report.html",
        description="Write the run's report: one file that needs no network. While the run goes on, and after it died.",
        epilog="example: steptron monitor report runs/demo",
    )
    report.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the run's folder, such as runs/demo")


def run(args: argparse.Namespace) -> int:
    """Write the page and say where it is. Returns the exit code."""
    from steptron.monitor.report import write_report

    print(write_report(args.run_dir))
    return 0
