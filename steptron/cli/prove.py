"""`steptron prove RECIPE [key=value …]`: recipe → prove/run.py."""

import argparse
import json


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "prove",
        help="prove on this machine's CPU that a recipe's layout does not change what is computed",
        description="Makes the recipe small, keeps the shape of its mesh, trains a few steps on many CPU processes and on one, and "
        "compares losses, gradients, parameters, expert counts and biases; then saves, loads under another layout and goes on. "
        "Exits with 0 where all is equal, with 3 where anything is off.",
        epilog="examples: steptron prove step3p5_flash · steptron prove demo parallel.dense.tp=2 parallel.expert.ep=4 · "
        "steptron prove my/recipe.yaml --ranks 16 --stage long --json",
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a name in recipes/pretrain/, such as demo, or the path of a YAML file"
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="Hydra overrides, as for train")
    parser.add_argument("--ranks", metavar="N", type=_count, default=8, help="processes to start at most (default: 8)")
    parser.add_argument("--steps", metavar="K", type=_count, default=3, help="steps to compare (default: 3)")
    parser.add_argument("--stage", metavar="NAME", default="", help="stage to take settings from (default: the first)")
    parser.add_argument(
        "--world",
        metavar="N",
        type=_count,
        help="ranks of your run, which say what an axis of -1 is (default: the fewest)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prove it. Returns the exit code."""
    from steptron.config.resolve import resolve

    recipe = resolve(args.recipe, args.overrides, args.recipes, stage=args.stage)

    # torch takes seconds to import: a recipe that is wrong is reported before.
    from steptron.prove.report import as_json, print_outcome
    from steptron.prove.run import prove

    outcome = prove(recipe, ranks=args.ranks, steps=args.steps, world_size=args.world)
    if args.json:
        print(json.dumps(as_json(outcome), indent=1))
    else:
        print_outcome(outcome)
    return outcome.exit_code


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return count
