"""Runs side by side: their state and figures, the keys of their recipes that differ, and a page with their curves.

run folders ─► read_run ─► Figures ─┬─► tables of `steptron compare` and `steptron sweep`
               recipe.yaml ─────────┴─► comparison.html: base.js, axes.js, compare.js of the report's page
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steptron.atomic import atomic_write
from steptron.errors import SteptronError
from steptron.monitor.dashboard import report
from steptron.monitor.dashboard.documents import curves, dump, read_recipe, state_of
from steptron.monitor.sinks import metrics_jsonl
from steptron.monitor.storage import ledger, metrics_table

SCRIPTS = ("base", "axes", "compare")
"""The page's scripts."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The state of a run and its last values. None stands for a value that is not there."""

    folder: str
    state: str
    """See `documents.state_of`."""
    step: int | None
    tokens: float | None
    """The tokens trained on."""
    loss: float | None
    """The next-token loss of the last step, in nats."""
    lowest_loss: float | None
    """The lowest next-token loss of a step, in nats."""
    grad_norm: float | None
    """The gradient norm of the last step."""
    tokens_per_second: float | None
    """The median over all steps."""
    mfu: float | None
    """The median over all steps."""
    seconds: float
    """The time of all steps together."""


def read_run(folder: Path) -> tuple[Figures, metrics_table.MetricsTable]:
    """Return the figures of a run, and its steps. A folder that does not hold a run has none."""
    rows = metrics_table.MetricsTable(folder / metrics_jsonl.FILE_NAME)
    rows.poll()
    return Figures(
        folder=str(folder),
        state=state_of(folder, ledger.read(folder), rows),
        step=rows.steps[-1] if rows.steps else None,
        tokens=rows.value("tokens", -1),
        loss=rows.value("loss", -1),
        lowest_loss=_of(rows, "loss", np.min),
        grad_norm=rows.value("grad_norm", -1),
        tokens_per_second=_of(rows, "tokens_per_second", np.median),
        mfu=_of(rows, "mfu", np.median),
        seconds=float(np.nansum(rows.column("step_time"))),
    ), rows


def differing(folders: Sequence[Path]) -> dict[str, list[Any]]:
    """Return the values of each key whose values differ between the recipes, without the runs' names and folders."""
    flat = [dict(_leaves(read_recipe(folder), "")) for folder in folders]
    keys = dict.fromkeys(key for values in flat for key in values)
    found = {key: [values.get(key) for values in flat] for key in keys}
    return {
        key: values
        for key, values in found.items()
        if any(value != values[0] for value in values) and key not in ("run.name", "run.dir")
    }


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return a name of each run: that of its folder, with as many parents as it takes to tell all apart."""
    paths = [folder.resolve() for folder in folders]
    length = next(
        (n for n in range(1, 99) if len({path.parts[-n:] for path in paths}) == len(set(paths))),
        99,
    )
    return ["/".join(path.parts[-length:]).replace("//", "/") for path in paths]


def write_page(folders: Sequence[Path], path: Path) -> None:
    """Write a page with the curves of these runs into the file `path`. Raises `SteptronError` if it cannot be
    written."""
    read = [read_run(folder) for folder in folders]
    runs = [
        {"name": name, **asdict(figures), "curves": curves(rows)}
        for name, (figures, rows) in zip(names_of(folders), read, strict=True)
    ]
    text = dump({"runs": runs, "differing": differing(folders)})
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(report.page_with({"comparison": text}, SCRIPTS), encoding="utf-8")
    except OSError as error:
        raise SteptronError(f"--out {path} cannot be written: {error.strerror}; choose another file") from error


def check_run(folder: Path) -> None:
    """Raise `SteptronError` if the folder does not hold a run."""
    if not (folder / "recipe.yaml").is_file() and not (folder / metrics_jsonl.FILE_NAME).is_file():
        raise SteptronError(
            f"{folder} is not a run folder: it has no recipe.yaml and no {metrics_jsonl.FILE_NAME}; "
            "give folders of runs, such as runs/demo"
        )


def _of(rows: metrics_table.MetricsTable, key: str, function: Any) -> float | None:
    values = rows.column(key)
    values = values[np.isfinite(values)]
    return float(function(values)) if len(values) else None


def _leaves(value: Any, path: str) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping) or not value:
        return [(path, value)]
    return [leaf for key, item in value.items() for leaf in _leaves(item, f"{path}.{key}" if path else str(key))]
