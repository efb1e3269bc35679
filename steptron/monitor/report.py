"""report.html: a run on one page that needs nothing but a browser, readable while the run goes on and after it died.

    recipe.yaml, metrics.jsonl, metrics/, ledger.jsonl ─► one JSON value ─┐
                             page/: page.html, page.css, *.js ─────────────┴► RUN_DIR/report.html

Whatever is missing or torn is left out of the page. Long runs are drawn from buckets of steps: the page stays small.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from steptron import __version__
from steptron.errors import SteptronError
from steptron.monitor import heatmap, ledger, lines, series
from steptron.monitor.sinks import jsonl

FILE_NAME = "report.html"
SCRIPTS = ("base.js", "curves.js", "experts.js", "tables.js")
"""The page's scripts, in the order in which they build on each other."""

MAX_POINTS = 1500
"""Points of a curve."""
MAX_LEDGER = 1000
"""Newest decisions shown."""
RUNNING_S = 180.0
"""Seconds since the last line within which an unfinished run counts as running."""
CURVES = (
    *("loss", "lm_loss", "mtp_loss", "balance_loss", "grad_norm", "lr"),
    *("tokens_per_second", "mfu", "step_time", "seq_len", "batch_tokens"),
)
"""Scalars that are drawn."""


def write_report(run_dir: Path) -> Path:
    """Write RUN_DIR/report.html, replacing an earlier one in one go.

    Returns:
        The page's path.

    Raises:
        SteptronError: `run_dir` is no run folder.
    """
    run_dir = Path(run_dir)
    if not any((run_dir / name).exists() for name in ("recipe.yaml", jsonl.FILE_NAME, ledger.FILE_NAME)):
        raise SteptronError(
            f"{run_dir} is no run folder: it has no recipe.yaml and no {jsonl.FILE_NAME}; "
            "give the folder of a run, such as runs/demo"
        )
    folder = files("steptron.monitor") / "page"
    page = (folder / "page.html").read_text(encoding="utf-8")
    values = _strict(gather(run_dir))
    # "<" is escaped, so that no text of the run can end the script element.
    data = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "/*STYLE*/": (folder / "page.css").read_text(encoding="utf-8"),
        "/*SCRIPT*/": "\n".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS),
        "/*DATA*/": data,  # last, so that nothing in it is taken for a mark
    }
    for mark, text in parts.items():
        page = page.replace(mark, text, 1)
    path = run_dir / FILE_NAME
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def gather(run_dir: Path) -> dict[str, Any]:
    """All that the page shows, as plain values."""
    recipe = _recipe(run_dir)
    by_step = {row["step"]: row for row in lines.read(run_dir / jsonl.FILE_NAME) if isinstance(row.get("step"), int)}
    rows = [by_step[step] for step in sorted(by_step)]
    events = ledger.read(run_dir)
    steps = [row["step"] for row in rows]
    names = [str(row.get("stage", "")) for row in rows]
    stages = _stages(recipe, rows, names)
    return {
        "run": _run(run_dir, recipe, rows, events, stages),
        "stages": stages,
        "curves": _curves(rows, names) if rows else None,
        "sources": _sources(rows),
        "experts": heatmap.read(run_dir, steps, names),
        "ledger": events[-MAX_LEDGER:],
        "ledger_left_out": max(0, len(events) - MAX_LEDGER),
    }


def _recipe(run_dir: Path) -> dict[str, Any]:
    """The resolved recipe as it stands in the folder; empty when it is missing or torn."""
    try:
        recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return recipe if isinstance(recipe, dict) else {}


def _run(
    run_dir: Path,
    recipe: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    stages: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Name, state and times."""
    last = rows[-1] if rows else {}
    metrics = run_dir / jsonl.FILE_NAME
    written = metrics.stat().st_mtime if metrics.exists() else None
    started = events[0].get("time") if events else None
    return {
        "name": (recipe.get("run") or {}).get("name") or run_dir.resolve().name,
        "state": _state(events, written, last),
        "started": started,
        "updated": _iso(written) if written else None,
        "written": _iso(time.time()),
        "version": __version__,
        "step": last.get("step"),
        "stage": last.get("stage"),
        "tokens": last.get("tokens"),
        "budget": sum(stage["budget"] or 0 for stage in stages) or None,
        "seconds": float(np.nansum(series.column(rows, "step_time"))),
        "resumes": sum(event.get("event") == "resume" for event in events),
    }


def _state(events: Sequence[Mapping[str, Any]], written: float | None, last: Mapping[str, Any]) -> str:
    """`finished` or `stopped` by the ledger; else `running`, `interrupted` (no end, and nothing new), or `empty`."""
    for event in reversed(events):
        if event.get("event") == "run_end":
            return "stopped" if event.get("reason") else "finished"
        if event.get("event") in ("run_start", "resume"):
            break
    if written is None or not last:
        return "empty"
    patience = RUNNING_S + 5 * float(last.get("step_time") or 0.0)
    return "running" if time.time() - written < patience else "interrupted"


def _stages(recipe: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """The curriculum in order: settings from the recipe, and the steps done in each stage."""
    configs: dict[str, Any] = recipe.get("stages") or {}
    done = {name: (start, stop) for name, start, stop in series.spans(names)}
    stages = []
    for name in [*configs, *(name for name in done if name not in configs)]:
        config = configs.get(name) or {}
        start, stop = done.get(name, (0, 0))
        began = (rows[start - 1].get("tokens") or 0) if start else 0
        stages.append(
            {
                "name": name,
                "budget": config.get("tokens"),
                "tokens": (rows[stop - 1].get("tokens") or 0) - began if stop else 0,
                "first": rows[start]["step"] if stop else None,
                "last": rows[stop - 1]["step"] if stop else None,
                "seq_len": config.get("seq_len") or (rows[start].get("seq_len") if stop else None),
                "batch_size": config.get("batch_size"),
                "mix": config.get("mix") or {},
                "lr": config.get("lr") or {},
                "mtp_weight": config.get("mtp_weight"),
                "rope_theta_full": config.get("rope_theta_full"),
                "bias_rate": (config.get("balance") or {}).get("bias_rate"),
            }
        )
    return stages


def _curves(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Mean of every scalar by bucket of steps, with minimum and maximum where a bucket holds several steps."""
    borders = series.edges(names, MAX_POINTS)
    ends = borders[1:] - 1
    several = len(borders) - 1 < len(rows)
    values: dict[str, Any] = {}
    for key in CURVES:
        numbers = series.column(rows, key)
        if not np.isfinite(numbers).any():
            continue
        mean, low, high = series.summarise(numbers, borders)
        values[key] = {"mean": _rounded(mean)}
        if several:
            values[key] |= {"low": _rounded(low), "high": _rounded(high)}
    losses = series.column(rows, "loss")
    return {
        "step": [rows[end]["step"] for end in ends],
        "tokens": [rows[end].get("tokens") for end in ends],
        "stage": [names[end] for end in ends],
        "bucket": int(np.diff(borders).max()),
        "values": values,
        "not_finite": [rows[row]["step"] for row in np.flatnonzero(~np.isfinite(losses))[:200]],
    }


def _sources(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Tokens read by stage and source."""
    totals: dict[str, dict[str, int]] = {}
    for row in rows:
        stage = totals.setdefault(str(row.get("stage", "")), {})
        for source, tokens in (row.get("tokens_by_source") or {}).items():
            stage[source] = stage.get(source, 0) + tokens
    return totals


def _rounded(values: np.ndarray) -> list[float | None]:
    """Six significant digits are more than a page can show."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]


def _strict(value: Any) -> Any:
    """The value without NaN and infinities, which JSON for browsers does not have: they become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
