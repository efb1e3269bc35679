"""`steptron show RECIPE [key=value …]`: recipe → resolved YAML and, as comments below it, what a run of it will be."""

import argparse
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from steptron.errors import SteptronError

if TYPE_CHECKING:
    from steptron.config.schema import Recipe
    from steptron.parallel.mesh import Layout

GIB = 1 << 30


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of the command."""
    parser = subparsers.add_parser(
        "show",
        help="show what a recipe is before running it",
        description="Print the resolved recipe as YAML and, as comments below it, parameters, layout, memory of a "
        "rank, and steps, tokens and operations of each stage. No weights are made. The output is a recipe file.",
        epilog="examples: steptron show demo · steptron show step3p5_flash --ranks 512 parallel.dense.tp=2 · "
        "steptron show --keys · steptron show demo stages.base.tokens=1M > mine.yaml",
    )
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        nargs="?",
        help="a name in recipes/pretrain/, such as demo, or a YAML file, such as ./demo.yaml",
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="Hydra overrides, as for train")
    parser.add_argument(
        "--ranks",
        metavar="N",
        type=int,
        help="number of ranks, where parallel.ranks does not give it (default: the fewest that fit)",
    )
    parser.add_argument(
        "--keys",
        action="store_true",
        help="list every key instead, with type, unit, default and meaning; with RECIPE, its keys and values",
    )


def run(args: argparse.Namespace) -> int:
    """Print the recipe, or the keys. Returns the exit code."""
    from steptron.cli.tell import tell
    from steptron.config.resolve import resolve, to_yaml

    if args.recipe is None and not args.keys:
        raise SteptronError("show needs a recipe, such as `steptron show demo`, or --keys for all keys")
    recipe = None if args.recipe is None else resolve(args.recipe, args.overrides, args.recipes, tell=tell)
    if args.keys:
        print("\n".join(described_keys(recipe)))
        return 0

    # torch takes seconds to import, so a wrong recipe is reported before.
    from steptron.doctor.recipe import smallest
    from steptron.parallel.rules import layouts_of

    assert recipe is not None, "it is missing only with --keys"
    layouts = smallest(recipe) if args.ranks is None else layouts_of(recipe, args.ranks)
    print(to_yaml(recipe) + "\n".join(f"# {line}".rstrip() for line in summary(recipe, layouts)))
    return 0


def summary(recipe: "Recipe", layouts: "list[Layout]") -> list[str]:
    """Return parameters, layouts, memory, and the table of the stages, as lines of text.

    `layouts`: one for each part of the recipe (`by_layout`).
    """
    from steptron.config.layouts import by_layout
    from steptron.config.schema import trained_heads
    from steptron.data.curriculum import num_steps
    from steptron.model.flops import flops_per_token, num_active_parameters, num_parameters

    model, stages = recipe.model, recipe.stages
    rows = [("stage", "length", "sequences", "tokens", "steps", "peak lr", "operations")]
    steps = [num_steps(stage) for stage in stages.values()]
    work = [
        stage.tokens * flops_per_token(model, stage.seq_len, trained_heads(model, stage)) for stage in stages.values()
    ]
    for (name, stage), count, flops in zip(stages.items(), steps, work, strict=True):
        sizes = [*dict.fromkeys([*(ramp.batch_size for ramp in stage.ramp), stage.batch_size])]
        numbers = (f"{stage.seq_len:,}", "→".join(f"{size:,}" for size in sizes), f"{stage.tokens:,}", f"{count:,}")
        rows.append((name, *numbers, f"{stage.lr.peak:g}", f"{flops:.3g}"))
    tokens = sum(stage.tokens for stage in stages.values())
    rows.append(("total", "", "", f"{tokens:,}", f"{sum(steps):,}", "", f"{sum(work):.3g}"))
    return [
        f"{recipe.run.name}: {num_parameters(model):,} parameters, {num_active_parameters(model):,} active for a token,"
        f" {recipe.precision}",
        *(line for part in zip(by_layout(recipe), layouts, strict=True) for line in _part(*part, len(layouts) > 1)),
        "",
        *aligned(rows),
        "An operation is a multiplication or an addition; forward and backward are counted, recomputation is not.",
    ]


def _part(recipe: "Recipe", layout: "Layout", is_one_of_several: bool) -> list[str]:
    """Return the layout and the memory of stages that have one layout."""
    from steptron.parallel.mesh import written_layout

    heading = [f"{'stages' if len(recipe.stages) > 1 else 'stage'} {', '.join(recipe.stages)}:"]
    heading = heading if is_one_of_several else []
    return [*heading, *written_layout(layout), *_pipeline(recipe, layout.dense["pp"]), *_memory(recipe, layout)]


def _pipeline(recipe: "Recipe", pp: int) -> list[str]:
    """Return the cut of a pipeline and how even the work of its ranks is."""
    from steptron.parallel.pipeline_split import cut, load_of_ranks

    if pp == 1:
        return []
    loads = load_of_ranks(recipe, pp)
    ends = ((part.units[0], part.units[-1]) for part in cut(recipe, pp))
    stages = (f"{a.kind} {a.number} to {b.kind} {b.number}" if a != b else f"{a.kind} {a.number}" for a, b in ends)
    return [
        f"pipeline: {' | '.join(stages)}",
        f"pipeline rank {loads.index(max(loads))} has most work, {max(loads):.2f} × the mean",
    ]


def _memory(recipe: "Recipe", layout: "Layout") -> list[str]:
    import torch

    from steptron.doctor.memory import dearest, described

    if recipe.engine != "native":
        return [f"memory of a rank: not known for engine={recipe.engine}"]
    cuda = recipe.run.device == "cuda" or (recipe.run.device == "auto" and torch.cuda.is_available())
    return [f"memory of a rank, at most: {described(dearest(recipe, layout, cuda), layout)}"]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows of a table as lines: the first column flush left, the others flush right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def described_keys(recipe: "Recipe | None") -> Iterator[str]:
    """Yield the lines about every key of the schema, or about every key of `recipe`, with its value."""
    from steptron.config.decode import encode
    from steptron.config.reference import keys

    values = encode(recipe) if recipe is not None else None
    for key in keys():
        found = [key.name]
        if values is not None:
            found = [f"{name} = {value}" for name, value in _members(values, key.name.split("."))]
        yield from found
        if found:
            yield f"    {key.kind}; {'required' if key.default is None else f'default {key.default}'}"
            yield textwrap.fill(key.effect, 100, initial_indent="    ", subsequent_indent="    ")


def _members(values: Any, parts: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield the keys that `parts` stands for, with their values; NAME and N stand for all members there."""
    if not parts:
        yield "", "null" if values is None else values
        return
    head, *rest = parts
    members: list[tuple[Any, Any]] = []
    if head == "NAME" and isinstance(values, Mapping):
        members = list(values.items())
    elif head == "N" and isinstance(values, list):
        members = list(enumerate(values))
    elif isinstance(values, Mapping):
        members = [(head, values[head])]
    for name, item in members:
        for below, value in _members(item, rest):
            yield f"{name}.{below}" if below else str(name), value
