"""`steptron eval CHECKPOINT|RUN_DIR`: arguments → an evaluation of train/ → tables, or one JSON object.

--data, --source ─► evaluate_checkpoint.py: losses on text
--tasks          ─► tasks.py: downstream tasks of lm-eval
--needle         ─► haystack.py: a needle-in-a-haystack sweep
"""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from steptron.cli.surroundings import rank
from steptron.errors import SteptronError

if TYPE_CHECKING:
    from rich.table import Table

    from steptron.train.evaluate import Evaluation
    from steptron.train.evaluate_checkpoint import EvalRequest
    from steptron.train.haystack import Cell
    from steptron.train.tasks import Metric

DEPTHS, REPEATS = (0.0, 25.0, 50.0, 75.0, 100.0), 5
"""The depths of --needle in percent, and its documents of each length and depth."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of the command."""
    parser = subparsers.add_parser(
        "eval",
        help="evaluate a checkpoint on text",
        description="Print next-token loss, perplexity and bits per byte of a checkpoint on text: by text, by position "
        "in the document, and the loss of each MTP head. --tasks runs downstream tasks instead, and --needle a "
        "needle-in-a-haystack sweep. Under torchrun, the recipe's layout is used.",
        epilog="examples: steptron eval runs/demo --data 'docs/*.md' · "
        "steptron eval runs/demo/checkpoints/step-00000100 --source data/mine/pages-held-out --json · "
        "steptron eval runs/demo --tasks hellaswag,piqa --shots 5 · "
        "steptron eval runs/demo --needle --lengths 512,4096",
    )
    parser.add_argument(
        "path",
        metavar="CHECKPOINT|RUN_DIR",
        type=Path,
        help="a run folder (its newest complete checkpoint), one of its checkpoints, or an imported model",
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        action="append",
        default=[],
        help="text: a file, folder or pattern, as `steptron data build` takes it; may be repeated",
    )
    parser.add_argument(
        "--source",
        metavar="DIR",
        type=Path,
        action="append",
        default=[],
        help="folder of a built source; may be repeated (default without --data: the recipe's evaluation.sources)",
    )
    parser.add_argument(
        "--tokens",
        metavar="N",
        type=_tokens,
        help="number of tokens of each text, from its start, such as 100K (default: the recipe's evaluation.tokens)",
    )
    parser.add_argument(
        "--seq-len", metavar="N", type=_count, help="length of a sequence in tokens (default: that of the stage)"
    )
    parser.add_argument(
        "--micro-batch",
        metavar="N",
        type=_count,
        default=1,
        help="sequences that a rank processes at once (default: 1)",
    )
    parser.add_argument(
        "--text-field", metavar="NAME", default="text", help="field of a record with the text (default: text)"
    )
    parser.add_argument(
        "--eos", metavar="TOKEN", help="token that ends a document of --data (default: that of the run's sources)"
    )
    _add_tasks(parser)
    _add_needle(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="Hydra overrides, such as run.device=cpu"
    )


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_argument_group(
        "downstream tasks", "They need the library lm-eval: pip install 'steptron[eval]'."
    )
    tasks.add_argument("--tasks", metavar="NAME[,NAME]", type=_names, help="names or patterns of tasks")
    tasks.add_argument(
        "--tasks-folder",
        metavar="DIR",
        type=Path,
        help="folder with YAML files of further tasks, as lm-eval reads them",
    )
    tasks.add_argument(
        "--shots", metavar="N", type=_not_negative, help="examples in the context (default: what the task says, or 0)"
    )
    tasks.add_argument("--limit", metavar="N", type=_count, help="number of questions of each task (default: all)")


def _add_needle(parser: argparse.ArgumentParser) -> None:
    needle = parser.add_argument_group(
        "needle in a haystack",
        "A statement is hidden in filler, and the end of the document asks for its value. The filler is the first text "
        "of --data, --source or the recipe's evaluation.sources, or else a few sentences.",
    )
    needle.add_argument("--needle", action="store_true", help="print the share of values found, by length and depth")
    needle.add_argument(
        "--lengths", metavar="N[,N]", type=_counts, help="lengths in tokens (default: that of a sequence, and its half)"
    )
    needle.add_argument(
        "--depths",
        metavar="P[,P]",
        type=_percents,
        help="percents of the filler that stand before the statement (default: 0,25,50,75,100)",
    )
    needle.add_argument(
        "--repeats", metavar="N", type=_count, help=f"documents of each length and depth (default: {REPEATS})"
    )
    needle.add_argument("--pairs", metavar="N", type=_count, help="statements, of which one is asked for (default: 1)")
    needle.add_argument("--statement", metavar="TEXT", help="statement, with {key:N} and {value:N} of N digits")
    needle.add_argument("--question", metavar="TEXT", help="question and answer, with {key:N} and {value:N}")
    needle.add_argument("--seed", metavar="N", type=_not_negative, help="seed of keys, values and filler (default: 0)")


class _Shown(NamedTuple):
    """The result of an evaluation, as it is printed."""

    checkpoint: str
    values: dict[str, Any]
    """The keys of the JSON object, besides the checkpoint."""
    tables: list["Table"]


def run(args: argparse.Namespace) -> int:
    """Evaluate and print on rank 0. Returns the exit code."""
    _check(args)
    # torch takes seconds to import, so a wrong command line is reported before.
    from rich.console import Console

    from steptron.train.evaluate_checkpoint import EvalRequest

    request = EvalRequest(
        path=args.path,
        data=args.data,
        sources=args.source,
        tokens=args.tokens,
        seq_len=args.seq_len,
        micro_batch=args.micro_batch,
        text_field=args.text_field,
        eos=args.eos,
        overrides=args.overrides,
        texts="none" if args.tasks else "optional" if args.needle else "needed",
    )
    evaluated = _tasks if args.tasks else _needle if args.needle else _texts
    shown = evaluated(args, request)
    if rank() == 0 and args.json:
        print(json.dumps({"checkpoint": shown.checkpoint, **shown.values}, indent=1))
    elif rank() == 0:
        console = Console(width=max(Console().width, 120), markup=False)
        console.print(shown.checkpoint, style="italic", soft_wrap=True)
        for table in shown.tables:
            console.print(table)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse options that would have no effect. Raises `SteptronError`."""
    if args.tasks and args.needle:
        raise SteptronError("--tasks and --needle are two evaluations; give one of them")
    belong = {
        "--tasks": ("tasks_folder", "shots", "limit"),
        "--needle": ("lengths", "depths", "repeats", "pairs", "statement", "question", "seed"),
    }
    for option, names in belong.items():
        for name in names:
            if getattr(args, name) is not None and not getattr(args, option[2:]):
                raise SteptronError(f"--{name.replace('_', '-')} belongs to {option}; give {option} too")
    if args.tasks and (args.data or args.source or args.tokens):
        raise SteptronError("--tasks reads no text; leave out --data, --source and --tokens")
    if args.needle and args.seq_len:
        raise SteptronError("--needle has lengths of its own; give --lengths instead of --seq-len")
    if args.tasks and importlib.util.find_spec("lm_eval") is None:
        raise SteptronError("--tasks needs the package lm-eval, which is not installed; pip install 'steptron[eval]'")


def _texts(args: argparse.Namespace, request: "EvalRequest") -> _Shown:
    from steptron.train.evaluate_checkpoint import evaluate_plan, plan_evaluation

    plan = plan_evaluation(request)
    found = evaluate_plan(plan)
    return _Shown(str(plan.checkpoint), {"texts": _values(found)}, _text_tables(found))


def _tasks(args: argparse.Namespace, request: "EvalRequest") -> _Shown:
    from steptron.train.evaluate_checkpoint import load_tokenizer, open_network, plan_evaluation
    from steptron.train.scoring import Scorer
    from steptron.train.tasks import find_tasks, run_tasks

    plan = plan_evaluation(request)
    used = load_tokenizer(plan.recipe, request.eos)
    # Only rank 0 asks, so only it has the tasks. If it fails here, the launcher ends the others.
    tasks = find_tasks(args.tasks, args.tasks_folder, args.shots) if rank() == 0 else None
    with open_network(plan) as (network, meshes):
        scorer = Scorer(network, meshes, plan.stage.seq_len, plan.stage.micro_batch)
        found = scorer.run(lambda: run_tasks(tasks, scorer, used, args.limit) if tasks else []) or []
    values = {"tasks": [_known_values(metric) for metric in found], "contexts_cut": scorer.num_cut}
    return _Shown(str(plan.checkpoint), values, [_task_table(found, scorer.num_cut)])


def _needle(args: argparse.Namespace, request: "EvalRequest") -> _Shown:
    from steptron.errors import RecipeError
    from steptron.train.evaluate_checkpoint import load_tokenizer, open_network, plan_evaluation
    from steptron.train.haystack import QUESTION, STATEMENT, Sweep, documents, read_filler, read_form, run_sweep
    from steptron.train.scoring import Scorer

    plan = plan_evaluation(request)
    used = load_tokenizer(plan.recipe, request.eos)
    sweep = Sweep(
        lengths=args.lengths or [plan.stage.seq_len // 2, plan.stage.seq_len],
        depths=args.depths or DEPTHS,
        repeats=args.repeats or REPEATS,
        pairs=args.pairs or 1,
        seed=args.seed or 0,
    )
    if (longest := max(sweep.lengths)) > plan.recipe.model.max_positions:
        raise RecipeError(
            f"--lengths={longest} is longer than the RoPE range, "
            f"model.max_positions={plan.recipe.model.max_positions}; give smaller ones"
        )
    form = read_form(args.statement or STATEMENT, args.question or QUESTION, used)
    text = next((text.stream for text in plan.texts.values()), None)
    filler_F = read_filler(text, used, plan.tokens)
    next(documents(sweep, form, filler_F, min(sweep.lengths)))  # a length without room is reported before the weights
    with open_network(plan) as (network, meshes):
        scorer = Scorer(network, meshes, longest - 1, plan.stage.micro_batch)
        found = scorer.run(lambda: run_sweep(sweep, form, filler_F, scorer)) or []
    values = {"pairs": sweep.pairs, "seed": sweep.seed, "needle": [_known_values(cell) for cell in found]}
    return _Shown(str(plan.checkpoint), values, [_needle_table(found)])


def _values(found: "Evaluation") -> dict[str, dict[str, Any]]:
    """Return the result by text. A value that is not known is null."""
    heads = range(1, found.losses_NHP.shape[1])
    return {
        name: {
            "targets": found.targets(name),
            "loss": _known(found.loss(name)),
            "perplexity": _known(found.perplexity(name)),
            "bits_per_byte": _known(found.bits_per_byte(name)),
            "mtp": [_known(found.loss(name, head)) for head in heads],
            "position": {str(start): _known(found.loss(name, bucket=p)) for p, start in enumerate(found.starts)},
        }
        for name in found.names
    }


def _known_values(result: "Metric | Cell") -> dict[str, Any]:
    """Return the fields of a result. A number that is not known is null."""
    return {name: _known(value) if isinstance(value, float) else value for name, value in result._asdict().items()}


def _known(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None


def _text_tables(found: "Evaluation") -> list["Table"]:
    from rich import box
    from rich.table import Table

    heads = [f"MTP {head}" for head in range(1, found.losses_NHP.shape[1])]
    table = Table("text", "targets", "loss", "perplexity", "bits/byte", *heads, box=box.SIMPLE)
    positions = Table("position in its document", *found.names, box=box.SIMPLE, title="loss by position")
    for column in (*table.columns[1:], *positions.columns[1:]):
        column.justify = "right"
    for name in found.names:
        losses = [found.loss(name, head) for head in range(1 + len(heads))]
        table.add_row(
            name,
            f"{found.targets(name):,}",
            _short(losses[0]),
            _short(found.perplexity(name)),
            _short(found.bits_per_byte(name)),
            *map(_short, losses[1:]),
        )
    for p, start in enumerate(found.starts):
        last = found.starts[p + 1] - 1 if p + 1 < len(found.starts) else None
        losses = [_short(found.loss(name, bucket=p)) for name in found.names]
        positions.add_row(f"{start:,} – {last:,}" if last is not None else f"{start:,} –", *losses)
    return [table, positions]


def _task_table(found: "list[Metric]", num_cut: int) -> "Table":
    from rich import box
    from rich.table import Table

    cut = f"{num_cut:,} contexts have lost their beginning: they are longer than a sequence" if num_cut else None
    table = Table("task", "metric", "value", "± standard error", box=box.SIMPLE, caption=cut)
    for metric in found:
        value = metric.value if isinstance(metric.value, str) else f"{metric.value:.4f}"
        table.add_row(metric.task, metric.metric, value, "–" if metric.stderr is None else f"{metric.stderr:.4f}")
    return table


def _needle_table(found: "list[Cell]") -> "Table":
    from rich import box
    from rich.table import Table

    depths = list(dict.fromkeys(cell.depth for cell in found))
    heads = [f"depth {depth:.4g} %" for depth in depths]
    table = Table("length", *heads, "all", box=box.SIMPLE, title="values found")
    for column in table.columns:
        column.justify = "right"
    for length in dict.fromkeys(cell.length for cell in found):
        cells = [cell for cell in found if cell.length == length]
        shares = [cell.found / cell.repeats for cell in cells]
        table.add_row(f"{length:,}", *(f"{share:.0%}" for share in (*shares, sum(shares) / len(shares))))
    return table


def _short(value: float) -> str:
    return "–" if value != value else f"{value:,.4f}"


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return count


def _not_negative(text: str) -> int:
    count = int(text)
    if count < 0:
        raise argparse.ArgumentTypeError(f"{text} must not be negative")
    return count


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if not names:
        raise argparse.ArgumentTypeError("give at least one name")
    return names


def _counts(text: str) -> list[int]:
    return sorted({_count(part) for part in text.split(",")})


def _percents(text: str) -> list[float]:
    percents = sorted({float(part) for part in text.split(",")})
    if not all(0 <= percent <= 100 for percent in percents):
        raise argparse.ArgumentTypeError(f"{text} must be percents, from 0 to 100")
    return percents


def _tokens(text: str) -> int:
    from steptron.config.decode import parse_tokens

    count = parse_tokens(text)
    if not count:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of tokens above 0, such as 250000 or 250K")
    return count
