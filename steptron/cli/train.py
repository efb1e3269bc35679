"""`steptron train RECIPE [key=value …]`: recipe → train/start.py → train/loop.py."""

import argparse


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
    parser.add_argument(
        "--or-resume",
        action="store_true",
        help="continue the run if its folder already holds it; for jobs that are requeued or restarted unchanged",
    )


def run(args: argparse.Namespace) -> int:
    """Train to the end of the last stage. Returns the exit code."""
    from steptron.cli.tell import tell
    from steptron.config.resolve import resolve
    from steptron.train.signals import Signals

    recipe = resolve(args.recipe, args.overrides, args.recipes, tell=tell)
    with Signals() as signals:
        # torch takes seconds to import, so a wrong recipe is reported before. Signals are noted from here on.
        from steptron.train.device import pick_device
        from steptron.train.loop import run_stages
        from steptron.train.process_group import process_group
        from steptron.train.run_folder import run_dir
        from steptron.train.start import new_run, next_layout

        with process_group(pick_device(recipe.run), recipe.run.timeout_s):
            with new_run(recipe, signals, or_resume=args.or_resume) as run_and_counters:
                finished = run_stages(*run_and_counters)
            while not finished:
                del run_and_counters  # it holds the network
                with next_layout(run_dir(recipe.run), signals) as run_and_counters:
                    finished = run_stages(*run_and_counters)
    return 0
