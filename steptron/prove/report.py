"""The outcome of a proof, as a table for a person and as one JSON value."""

from dataclasses import asdict
from math import isfinite
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from steptron.parallel.mesh import recipe_key, resolve_layout
from steptron.prove.compare import GRADIENTS, HELD, OUTPUTS, PARAMETERS, Comparison, summarise
from steptron.prove.layout import describe
from steptron.prove.run import ProofOutcome

OF = {HELD: "parameter", OUTPUTS: "output of", GRADIENTS: "gradient of", PARAMETERS: "parameter"}
"""The name of one quantity of each kind."""


def print_outcome(outcome: ProofOutcome) -> None:
    """Print the meshes, the shrunk sizes, one line per quantity, and the verdict last."""
    console, small = Console(), outcome.small
    layout = small.fit.layout
    console.print(f"your mesh   {describe(small.asked)}")
    console.print(f"proved as   {describe({**layout.dense, **layout.expert})}, on {layout.world_size} ranks")
    if small.fit.left_out:
        more = f"; --ranks {small.fit.enough} has room for all" if small.fit.enough else ""
        console.print(
            f"[yellow]not covered with {layout.world_size} ranks: "
            f"{', '.join(map(recipe_key, small.fit.left_out))}{more}[/]"
        )
    if outcome.seed != small.recipe.seed:
        why = "a token was at a tie between two experts, which rounding alone decides"
        console.print(f"with seed   {outcome.seed}, not {small.recipe.seed}: {why}")
    changes = Table("made small", "yours", "here", box=None, padding=(0, 2, 0, 0))
    for key, (yours, here) in small.changes.items():
        changes.add_row(key, _value(yours), _value(here))
    console.print(changes)
    console.print(_table(outcome))
    console.print(verdict(outcome), style="green" if outcome.offending is None else "bold red", soft_wrap=True)


def verdict(outcome: ProofOutcome) -> str:
    """Return the last line."""
    offending = outcome.offending
    if offending is None:
        left_out = outcome.small.fit.left_out
        but = f", but for {', '.join(map(recipe_key, left_out))}" if left_out else ""
        ranks = outcome.small.fit.layout.world_size
        return f"proved{but}: {ranks} ranks do what one process does ({outcome.seconds:.0f} s)"
    return f"NOT proved: first offending: {called(offending)}"


def called(finding: Comparison) -> str:
    """Return a finding in words: quantity, error, place."""
    name = f"{OF.get(finding.kind, finding.kind.title)} {finding.name}" if finding.name else finding.kind.title
    parts = [name]
    parts += (
        [f"relative error {finding.error:.1e}"] if isfinite(finding.error) or finding.error != finding.error else []
    )
    parts += [f"step {finding.step}"] if finding.step else []
    parts += [f"rank {finding.rank}"] if finding.rank is not None else []
    parts += [finding.remark] if finding.remark else []
    return ", ".join(parts)


def as_json(outcome: ProofOutcome) -> dict[str, Any]:
    """Return the outcome as JSON values. Errors that are infinite or NaN are null."""
    small, offending = outcome.small, outcome.offending
    layout = small.fit.layout
    return {
        "proved": offending is None,
        "first_offending": None if offending is None else _finding(offending),
        "ranks": layout.world_size,
        "steps": outcome.steps,
        "seed": outcome.seed,
        "your_mesh": small.asked,
        "mesh": {**layout.dense, **layout.expert},
        "second_mesh": _second_mesh(outcome),
        "not_covered": list(small.fit.left_out),
        "ranks_to_cover_all": small.fit.enough,
        "changes": {key: list(pair) for key, pair in small.changes.items()},
        "quantities": [_finding(finding) for finding in summarise(outcome.findings)],
        "quantities_after_load": [_finding(finding) for finding in summarise(outcome.findings_after)],
        "seconds": round(outcome.seconds, 1),
    }


def _table(outcome: ProofOutcome) -> Table:
    steps = f"{outcome.steps} step{'s' if outcome.steps > 1 else ''}"
    where = Column("where", overflow="fold")  # do not truncate names
    table = Table("quantity", "worst relative error", "bound", where, title=f"{steps} beside one process")
    after = f"saved, loaded under {describe(_second_mesh(outcome))}"
    for part, findings in ((None, outcome.findings), (after, outcome.findings_after)):
        if part:
            table.add_section()
            table.add_row(f"[italic]{part}[/]", "", "", "")
        for finding in summarise(findings):
            style = "" if finding.holds else "bold red"
            bound = f"{finding.kind.bound:.0e}" if finding.kind.bound else "equal"
            where = finding.where if finding.error else ""
            table.add_row(finding.kind.title, _error(finding), bound, where, style=style)
    return table


def _second_mesh(outcome: ProofOutcome) -> dict[str, int]:
    layout = resolve_layout(outcome.small.second.parallel, outcome.small.fit.layout.world_size)
    return {**layout.dense, **layout.expert}


def _error(finding: Comparison) -> str:
    if finding.error == 0:
        return "0"
    return f"{finding.error:.1e}" if isfinite(finding.error) else finding.remark or "infinite"


def _value(value: object) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _finding(finding: Comparison) -> dict[str, Any]:
    values = asdict(finding)
    return values | {
        "kind": finding.kind.title,
        "bound": finding.kind.bound,
        "error": finding.error if isfinite(finding.error) else None,
        "holds": finding.holds,
    }
