"""`steptron eval CHECKPOINT|RUN_DIR`: arguments → train/evaluate_checkpoint.py → tables, or one JSON object."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steptron.cli.surroundings import rank

if TYPE_CHECKING:
    from steptron.train.evaluate import Evaluation


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of the command."""
    parser = subparsers.add_parser(
        "eval",
        help="evaluate a checkpoint on text",
        description="Print next-token loss, perplexity and bits per byte of a checkpoint on text: by text, by position "
        "in the document, and the loss of each MTP head. Under torchrun, the recipe's layout is used.",
        epilog="examples: steptron eval runs/demo --data 'docs/*.md' · "
        "steptron eval runs/demo/checkpoints/step-00000100 --source data/mine/pages-held-out --json",
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
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="Hydra overrides, such as run.device=cpu"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate and print on rank 0. Returns the exit code."""
    # torch takes seconds to import, so a wrong command line is reported before.
    from steptron.train.evaluate_checkpoint import EvalRequest, evaluate_plan, plan_evaluation

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
    )
    plan = plan_evaluation(request)
    found = evaluate_plan(plan)
    if rank() == 0:
        if args.json:
            print(json.dumps({"checkpoint": str(plan.checkpoint), "texts": _values(found)}, indent=1))
        else:
            _print(plan.checkpoint, found)
    return 0


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


def _known(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None


def _print(checkpoint: Path, found: "Evaluation") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    heads = [f"MTP {head}" for head in range(1, found.losses_NHP.shape[1])]
    table = Table("text", "targets", "loss", "perplexity", "bits/byte", *heads, box=box.SIMPLE, title=str(checkpoint))
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
    console = Console(width=max(Console().width, 120), markup=False)
    console.print(table)
    console.print(positions)


def _short(value: float) -> str:
    return "–" if value != value else f"{value:,.4f}"


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return count


def _tokens(text: str) -> int:
    from steptron.config.decode import parse_tokens

    count = parse_tokens(text)
    if not count:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of tokens above 0, such as 250000 or 250K")
    return count
