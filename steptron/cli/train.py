"""`steptron train RECIPE [key=value …]`: recipe → train/loop.py."""

import argparse


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "train",
        help="start a run",
        description="Start a run from a recipe. Under torchrun this is one rank of it.",
        epilog="examples: steptron train demo · steptron train demo stages.base.tokens=1M run.name=short · "
        "steptron train my/recipe.yaml optim=adamw",
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a name in recipes/pretrain/, such as demo, or the path of a YAML file"
    )
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],
        help="Hydra overrides: key=value, group=name, +new.key=value, ~key; token counts take K, M, B, T",
    )


def run(args: argparse.Namespace) -> int:
    """Train to the end of the last stage. Returns the exit code."""
    from steptron.config.resolve import resolve

    recipe = resolve(args.recipe, args.overrides, args.recipes)

    # torch takes seconds to import: a recipe that is wrong is reported before.
    from steptron.train.loop import train

    return train(recipe)
