"""`steptron prove RECIPE [key=value …]`: recipe → prove/run.py."""

import argparse
import json


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of the command."""
    parser = subparsers.add_parser(
        "prove",
        help="prove on this machine's CPU that a recipe's layout does not change what is computed",
        description="Shrink the recipe, keep the shape of its mesh, train a few steps on many CPU processes and on "
        "one, and compare losses, gradients, parameters, expert counts and biases. "
        "Then save, load under another layout and continue. "
        "Exits with code 0 if everything is equal, and with code 3 otherwise.",
        epilog="examples: steptron prove step3p5_flash · "
        "steptron prove demo parallel.dense.tp=2 parallel.expert.ep=4 · "
        "steptron prove my/recipe.yaml --ranks 16 --stage long --json",
    )
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="a name in recipes/pretrain/, such as demo, or a YAML file, such as ./demo.yaml",
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="Hydra overrides, as for train")
    parser.add_argument("--ranks", metavar="N", type=_count, default=8, help="maximum number of processes (default: 8)")
    parser.add_argument("--steps", metavar="K", type=_count, default=3, help="number of steps to compare (default: 3)")
    parser.add_argument(
        "--stage", metavar="NAME", default="", help="stage whose settings are used (default: the first)"
    )
    parser.add_argument(
        "--world",
        metavar="N",
        type=_count,
        help="number of ranks of your run, which decides the size of an axis of -1 (default: the fewest that fit)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Run the proof. Returns the exit code."""
    from steptron.cli.tell import tell
    from steptron.config.resolve import resolve

    recipe = resolve(args.recipe, args.overrides, args.recipes, stage=args.stage, tell=tell)

    # torch takes seconds to import, so a wrong recipe is reported before.
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
