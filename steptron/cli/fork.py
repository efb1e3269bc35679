"""`steptron fork RUN_DIR NAME [key=value …]`: another run's recipe, with changes → train/start.py → train/loop.py."""

import argparse
from pathlib import Path


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of the command."""
    parser = subparsers.add_parser(
        "fork",
        help="start a new run from a checkpoint of another",
        description="Start a new run with the weights, the optimizer state and the data position of another run's "
        "checkpoint. The other run is only read, and may be in training.",
        epilog="example: steptron fork runs/demo warmer --step 64 stages.longer.lr.peak=1e-3",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the other run's folder, such as runs/demo")
    parser.add_argument("name", metavar="NAME", help="run.name of the new run; its folder is beside RUN_DIR")
    parser.add_argument(
        "--step", metavar="N", type=int, help="start from the checkpoint of step N, not from the newest complete one"
    )
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],
        help="Hydra overrides; they may change what a resume may change, run.dir, and the mix of the present stage",
    )


def run(args: argparse.Namespace) -> int:
    """Train to the end of the last stage. Returns the exit code."""
    from steptron.cli.part_of_run import refuse_part_of_run
    from steptron.cli.tell import tell
    from steptron.config.changes import changes
    from steptron.config.paths import load_fork
    from steptron.train.signals import Signals

    refuse_part_of_run(args.run_dir, "fork", step="--step", more=(args.name, *args.overrides))
    old, recipe = load_fork(args.run_dir, args.name, args.overrides, tell)
    changes(old, recipe, renamed=True)

    with Signals() as signals:
        # torch takes seconds to import, so a forbidden change is reported before. Signals are noted from here on.
        from steptron.train.device import pick_device
        from steptron.train.loop import run_stages
        from steptron.train.process_group import process_group
        from steptron.train.start import forked_run, next_layout

        with process_group(pick_device(recipe.run), recipe.run.timeout_s, recipe.run.deterministic):
            with forked_run(recipe, args.run_dir, old, args.step, signals) as run_and_counters:
                finished = run_stages(*run_and_counters)
            while not finished:
                del run_and_counters  # it holds the network
                with next_layout(Path(recipe.run.dir), signals) as run_and_counters:
                    finished = run_stages(*run_and_counters)
    return 0
