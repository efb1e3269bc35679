"""`steptron resume RUN_DIR [key=value …]`: run folder → recipe with changes → train/start.py → train/loop.py."""

import argparse
from pathlib import Path


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of the command."""
    parser = subparsers.add_parser(
        "resume",
        help="continue a run",
        description="Continue a run from its newest complete checkpoint, with the recipe in its folder.",
        epilog="example: steptron resume runs/demo stages.base.tokens=2M",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the run's folder, such as runs/demo")
    parser.add_argument(
        "--step",
        metavar="N",
        type=int,
        help="continue from the checkpoint of step N; later ones are renamed to checkpoints/abandoned-step-…",
    )
    parser.add_argument(
        "--from",
        dest="place",
        metavar="PLACE",
        help="if RUN_DIR is lost, restore the run from its mirror COPY_TO/NAME, such as s3://bucket/runs/demo",
    )
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],
        help="Hydra overrides; they may change the layout and budgets, not the model",
    )


def run(args: argparse.Namespace) -> int:
    """Continue to the end of the last stage. Returns the exit code."""
    from steptron.cli.part_of_run import refuse_part_of_run
    from steptron.cli.tell import tell
    from steptron.config import identity
    from steptron.config.changes import changes
    from steptron.config.paths import load_run
    from steptron.train.signals import Signals

    refuse_part_of_run(args.run_dir, "resume", step="--step", more=tuple(args.overrides))
    path = args.run_dir / "recipe.yaml"
    if args.place and not path.is_file():
        from steptron.checkpoint.remote import Remote

        Remote(args.place).bring_records(args.run_dir)
    recipe, known = load_run(args.run_dir, args.overrides, tell), identity.read(args.run_dir)
    copied = known is not None and (bool(known.copy_of) or identity.is_copy(known, args.run_dir))
    changed = changes(load_run(args.run_dir), recipe, renamed=copied)

    with Signals() as signals:
        # torch takes seconds to import, so a forbidden change is reported before. Signals are noted from here on.
        from steptron.train.device import pick_device
        from steptron.train.loop import run_stages
        from steptron.train.process_group import process_group
        from steptron.train.start import next_layout, resumed_run

        with process_group(pick_device(recipe.run), recipe.run.timeout_s, recipe.run.deterministic):
            with resumed_run(recipe, args.run_dir, changed, args.step, signals) as run_and_counters:
                finished = run_stages(*run_and_counters)
            while not finished:
                del run_and_counters  # it holds the network
                with next_layout(args.run_dir, signals) as run_and_counters:
                    finished = run_stages(*run_and_counters)
    return 0
