"""`steptron train RECIPE [key=value …]`: recipe → train/start.py → train/loop.py."""

import argparse
from dataclasses import replace


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of the command."""
    parser = subparsers.add_parser(
        "train",
        help="start a run",
        description="Start a run from a recipe. Under torchrun, run one rank of it.",
        epilog="examples: steptron train demo · steptron train demo stages.base.tokens=1M run.name=short · "
        "steptron train my/recipe.yaml optim=adamw",
    )
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="a name in recipes/pretrain/, such as demo, or a YAML file, such as ./demo.yaml",
    )
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],
        help="Hydra overrides: key=value, group=name, +new.key=value, ~key; token counts take K, M, B, T",
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--or-resume",
        action="store_true",
        help="continue the run if its folder already holds it; for jobs that are requeued or restarted unchanged",
    )
    start.add_argument(
        "--dry-run",
        action="store_true",
        help="do all but the first step: ranks, run folder, data, network, weights; the run can start there afterwards",
    )
    parser.add_argument(
        "--profile",
        metavar="A:B",
        type=_steps,
        default=range(0),
        help="write a trace and the memory of steps A to B of rank 0 to RUN_DIR/profile/",
    )


def run(args: argparse.Namespace) -> int:
    """Train to the end of the last stage. Returns the exit code."""
    from steptron.cli.tell import tell
    from steptron.config.resolve import resolve
    from steptron.train.signals import Signals

    recipe = resolve(args.recipe, args.overrides, args.recipes, tell=tell)
    if args.dry_run:  # it is no run that W&B should show
        recipe = replace(recipe, monitor=replace(recipe.monitor, wandb=replace(recipe.monitor.wandb, mode="disabled")))
    with Signals() as signals:
        # torch takes seconds to import, so a wrong recipe is reported before. Signals are noted from here on.
        from steptron.doctor.memory import refuse_what_cannot_fit
        from steptron.train.device import pick_device
        from steptron.train.loop import rehearse, run_stages
        from steptron.train.process_group import launched_layouts, process_group
        from steptron.train.run_folder import holds_run, run_dir
        from steptron.train.start import new_run, next_layout

        folder, device = run_dir(recipe.run), pick_device(recipe.run)
        with process_group(device, recipe.run.timeout_s, recipe.run.deterministic):
            if not holds_run(folder):  # a run that is continued may be past stages that need other ranks
                refuse_what_cannot_fit(recipe, launched_layouts(recipe), device)
            with new_run(recipe, signals, or_resume=args.or_resume) as run_and_counters:
                if args.dry_run:
                    rehearse(*run_and_counters)
                finished = args.dry_run or run_stages(*run_and_counters, args.profile)
            while not finished:
                del run_and_counters  # it holds the network
                with next_layout(folder, signals) as run_and_counters:
                    finished = run_stages(*run_and_counters, args.profile)
    if args.dry_run:
        tell(f"dry run: {folder} is ready, and no step was made; start the run without --dry-run")
    return 0


def _steps(text: str) -> range:
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text} must be two steps A:B, such as 10:12, counted from 1")
    return range(int(first), int(last) + 1)
