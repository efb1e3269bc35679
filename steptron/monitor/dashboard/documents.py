"""The content of the pages, as JSON documents by name. The live page fetches them; the report contains them.

    recipe.yaml ─────────────┐
    metrics.jsonl ─► Rows ───┼► run · curves
    ledger.jsonl ────────────┴► ledger
    metrics/ ─► PlaneReader ───► tables · cells/TABLE/STATISTIC · spread/TABLE · series/TABLE

Missing or incomplete parts are left out. Each document has a tag that changes with its text, so that no page fetches
the same text twice.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from steptron import __version__
from steptron.config import identity
from steptron.errors import SteptronError
from steptron.monitor.dashboard import heatmap
from steptron.monitor.dashboard.plane_reader import PlaneReader
from steptron.monitor.sinks import metrics_jsonl
from steptron.monitor.statistics import downsample
from steptron.monitor.storage import ledger, metrics_table
from steptron.monitor.storage.files import FOLDER_NAME

MAX_POINTS = 1500
"""The number of points of a curve."""
MAX_LEDGER = 1000
"""The number of newest decisions that are shown."""
RUNNING_S = 180.0
"""The seconds since the last line within which an unfinished run counts as running."""
STATES = {1: "failed", 2: "failed", 3: "stopped", 75: "saved", 76: "saved"}
"""The state of a run that has ended early, by its exit code. `saved`: it stopped on a signal, or before a stage that
needs another number of ranks, and a resume continues it."""
ABSENT_AT_ZERO = ("mtp_loss", "balance_loss")
"""Losses that are not drawn if they are 0 in every step, because the recipe does not have them."""
CURVES = (
    *("loss", "mtp_loss", "balance_loss", "total_loss", "grad_norm", "lr"),
    *("tokens_per_second", "mfu", "step_time", "seq_len", "batch_tokens", "eval/loss", "eval/bits_per_byte"),
)
"""The scalars that are drawn."""

Spans = list[tuple[str, int, int]]
"""Runs of steps of one stage: (stage, first position, position after the last)."""


class Dashboard:
    """The documents of one run. It must not be used by several threads at once."""

    def __init__(self, run_dir: Path):
        """Open a run folder. Raises `SteptronError` if `run_dir` is not one."""
        run_dir = Path(run_dir)
        if not any((run_dir / name).is_file() for name in ("recipe.yaml", metrics_jsonl.FILE_NAME, ledger.FILE_NAME)):
            raise SteptronError(
                f"{run_dir} is not a run folder: it has no recipe.yaml and no {metrics_jsonl.FILE_NAME}; "
                "give the folder of a run, such as runs/demo"
            )
        self._run_dir = run_dir
        self._recipe = read_recipe(run_dir)
        self._rows = metrics_table.MetricsTable(run_dir / metrics_jsonl.FILE_NAME)
        self._events: list[dict[str, Any]] = []
        self._events_size = -1
        store = (self._recipe.get("monitor") or {}).get("store") or run_dir / FOLDER_NAME
        self._watch = PlaneReader(str(store))
        self._texts: dict[str, tuple[str, str]] = {}
        self._spans: Spans = []
        """Runs of steps of one stage, cached because every document needs them, and finding them can take long."""
        self.reading = False
        """True while older steps of the plane are still being read."""

    def refresh(self, budget_s: float | None = None) -> None:
        """Read what is new; spend at most `budget_s` seconds on the plane (None: no limit)."""
        path = self._run_dir / ledger.FILE_NAME
        size = path.stat().st_size if path.exists() else 0
        if size != self._events_size:
            self._events, self._events_size = ledger.read(self._run_dir), size
        if not self._recipe:
            self._recipe = read_recipe(self._run_dir)
        self._rows.poll()
        self._spans = downsample.spans(self._rows.stages)
        starts = metrics_table.starts(self._rows.steps, self._spans)
        epoch = sum(event.get("event") in ("resume", "rewind") for event in self._events)
        self.reading = self._watch.poll(starts, epoch, budget_s)

    def tags(self) -> dict[str, str]:
        """Return the name of each document, and its tag."""
        rows_tag = f"{self._rows.revision}-{bool(self._recipe)}"
        tags = {
            "run": f"{rows_tag}-{self._events_size}-{self._state()}",
            "curves": rows_tag,
            "ledger": str(self._events_size),
            "tables": f"{self._watch.generation}-{len(self._watch.views)}",
        }
        for name, view in self._watch.views.items():
            tag = f"{self._watch.generation}-{view.revision}"
            if view.revision and len(view.axes) == 1:
                tags[f"series/{name}"] = tag
            elif view.revision:
                tags[f"spread/{name}"] = tag
                tags |= {f"cells/{name}/{column}": tag for column, _ in view.columns}
        return tags

    def document(self, name: str) -> str:
        """Return the text of a document. Raises `KeyError` if no document has that name."""
        tag = self.tags()[name]
        known = self._texts.get(name)
        if known is None or known[0] != tag:
            known = (tag, dump(self._make(name)))
            self._texts[name] = known
        return known[1]

    def _make(self, name: str) -> Any:
        kind, _, rest = name.partition("/")
        table, _, column = rest.partition("/")
        stages = [stage for stage, _, _ in self._spans]
        match kind:
            case "run":
                return self._run()
            case "curves":
                return curves(self._rows)
            case "ledger":
                return {"events": self._events[-MAX_LEDGER:], "left_out": max(0, len(self._events) - MAX_LEDGER)}
            case "tables":
                return {name: heatmap.describe(view) for name, view in self._watch.views.items()}
            case "series":
                return heatmap.named(self._watch.views[table], stages)
            case "spread":
                return heatmap.edges(self._watch.views[table], stages)
            case _:
                return heatmap.cells(self._watch.views[table], column, stages)

    def _run(self) -> dict[str, Any]:
        """Return name, state and times, the curriculum, and tokens by stage and source."""
        known, events = self._rows, self._events
        metrics = self._run_dir / metrics_jsonl.FILE_NAME
        written = metrics.stat().st_mtime if metrics.exists() else None
        stages = _stages(self._recipe, known, self._spans)
        last = len(known.steps) - 1
        budget = sum(stage["budget"] or 0 for stage in stages) or None
        tokens = known.value("tokens", last)
        speed = known.column("tokens_per_second")[-32:]
        speed = float(np.nanmean(speed)) if np.isfinite(speed).any() else None
        return {
            "name": (self._recipe.get("run") or {}).get("name") or self._run_dir.resolve().name,
            "state": self._state(),
            "reason": (end_of(self._events) or {}).get("reason"),
            "started": events[0].get("time") if events else None,
            "updated": _iso(written) if written else None,
            "updated_s": written,
            "written": _iso(time.time()),
            "version": __version__,
            "step": known.steps[-1] if known.steps else None,
            "stage": known.stages[-1] if known.stages else None,
            "tokens": tokens,
            "budget": budget,
            "left_s": max(0.0, budget - tokens) / speed if budget and tokens is not None and speed else None,
            "seconds": float(np.nansum(known.column("step_time"))),
            "origin": self._origin(),
            "parent": _parent(self._run_dir),
            "resumes": sum(event.get("event") == "resume" for event in events),
            "stages": stages,
            "source_names": _source_names(self._recipe, known, self._spans),
            "sources": {name: known.sources(start, stop) for name, start, stop in self._spans},
        }

    def _origin(self) -> dict[str, Any]:
        """Return commit, command line, host and versions of the newest start of the run; empty if unknown."""
        kinds = ("run_start", "resume", "fork")
        starts = (event for event in reversed(self._events) if event.get("event") in kinds)
        return next(starts, {}).get("origin") or {}

    def _state(self) -> str:
        return state_of(self._run_dir, self._events, self._rows)


def end_of(events: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the ledger's line of the run's end; None if the run has not ended, or has been continued since."""
    kinds = ("run_end", "run_start", "resume", "fork")
    ends = (event for event in reversed(events) if event.get("event") in kinds)
    last = next(ends, {})
    return last if last.get("event") == "run_end" else None


def state_of(run_dir: Path, events: Sequence[Mapping[str, Any]], rows: metrics_table.MetricsTable) -> str:
    """Return one of `STATES` by the ledger's end; else `finished`, `running`, `interrupted` (no end, and nothing new),
    or `empty`."""
    if (end := end_of(events)) is not None:
        return STATES.get(end.get("exit_code", 3), "stopped") if end.get("reason") else "finished"
    metrics = run_dir / metrics_jsonl.FILE_NAME
    if not metrics.exists() or not rows.steps:
        return "empty"
    patience = RUNNING_S + 5 * (rows.value("step_time", -1) or 0.0)
    return "running" if time.time() - metrics.stat().st_mtime < patience else "interrupted"


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The loader of libyaml, which is faster, where PyYAML was built with it."""


def read_recipe(run_dir: Path) -> dict[str, Any]:
    """Return the resolved recipe from the folder; empty if it is missing or incomplete."""
    try:
        recipe = yaml.load((run_dir / "recipe.yaml").read_text(encoding="utf-8"), _LOADER)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return recipe if isinstance(recipe, dict) else {}


def _parent(run_dir: Path) -> dict[str, Any] | None:
    """Return the run that this one was forked from. None: it was not, or run.json cannot be read."""
    try:
        known = identity.read(run_dir)
    except SteptronError:
        return None
    return asdict(known.parent) if known and known.parent else None


def _source_names(recipe: Mapping[str, Any], known: metrics_table.MetricsTable, spans: Spans) -> list[str]:
    """Return all sources, those of the recipe first and in its order, which determines their colours."""
    names = list((recipe.get("data") or {}).get("sources") or {})
    for _, start, stop in spans:
        names += [name for name in known.sources(start, stop) if name not in names]
    return names


def _stages(recipe: Mapping[str, Any], known: metrics_table.MetricsTable, spans: Spans) -> list[dict[str, Any]]:
    """The curriculum in order: settings from the recipe, and the steps done in each stage."""
    configs: dict[str, Any] = recipe.get("stages") or {}
    done = {name: (start, stop) for name, start, stop in spans}
    stages = []
    for name in [*configs, *(name for name in done if name not in configs)]:
        config = configs.get(name) or {}
        start, stop = done.get(name, (0, 0))
        began = (known.value("tokens", start - 1) or 0) if start else 0
        stages.append(
            {
                "name": name,
                "budget": config.get("tokens"),
                "tokens": (known.value("tokens", stop - 1) or 0) - began if stop else 0,
                "first": known.steps[start] if stop else None,
                "last": known.steps[stop - 1] if stop else None,
                "seq_len": config.get("seq_len") or (known.value("seq_len", start) if stop else None),
                "batch_size": config.get("batch_size"),
                "mix": config.get("mix") or {},
                "lr": config.get("lr") or {},
                "mtp_weight": config.get("mtp_weight"),
                "rope_theta_full": config.get("rope_theta_full"),
                "bias_rate": (config.get("balance") or {}).get("bias_rate"),
            }
        )
    return stages


def curves(known: metrics_table.MetricsTable) -> dict[str, Any] | None:
    """Return the mean of every scalar by bucket of steps, with minimum and maximum if a bucket holds several steps."""
    if not known.steps:
        return None
    borders = downsample.edges(known.stages, MAX_POINTS)
    ends = (borders[1:] - 1).tolist()
    several = len(borders) - 1 < len(known.steps)
    values: dict[str, Any] = {}
    for key in CURVES:
        numbers = known.column(key)
        if not np.isfinite(numbers).any() or (key in ABSENT_AT_ZERO and not np.nan_to_num(numbers).any()):
            continue
        mean, low, high = downsample.summarise(numbers, borders)
        values[key] = {"mean": _rounded(mean)}
        if several:
            values[key] |= {"low": _rounded(low), "high": _rounded(high)}
    losses, tokens = known.column("loss"), known.column("tokens")
    return {
        "step": [known.steps[end] for end in ends],
        "tokens": [int(tokens[end]) if math.isfinite(tokens[end]) else None for end in ends],
        "stage": [known.stages[end] for end in ends],
        "bucket": int(np.diff(borders).max()),
        "values": values,
        "not_finite": [known.steps[row] for row in np.flatnonzero(~np.isfinite(losses))[:200]],
    }


def dump(value: Any) -> str:
    """Return JSON that browsers read and that can stand in a page: no text of a run can end the script element around
    it."""
    text = json.dumps(strict(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def strict(value: Any) -> Any:
    """Return the value with NaN and infinities as text, because JSON for browsers has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return value


def _rounded(values: Sequence[float] | np.ndarray) -> list[float | None]:
    """Round to six significant digits, more than a page can show."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
