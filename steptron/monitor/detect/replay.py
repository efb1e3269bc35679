"""A check of the ledger's decisions: run detectors and policy again on the vital planes that the run has stored.

    ledger.jsonl ─► Timeline: thresholds in force, stages, alarms and decisions of the steps that were not undone
    metrics/ ─► vital planes, step by step ─┬─► Detectors ─► Policy ─► events ──compare──► table, exit code
    judged/ ─► steps that do not count ─────┘

A resume or a rewind drops the planes of the steps that it undoes. Decisions in those steps cannot be replayed and are
only counted. The exception is the step that caused the rewind or stop: rank 0 has kept the evidence for it, including
the state of the detectors.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from steptron.config.decode import decode
from steptron.config.detectors import DetectorsConfig, PolicyConfig
from steptron.config.paths import load_run
from steptron.errors import SteptronError
from steptron.monitor.detect import Detectors, Surroundings
from steptron.monitor.detect.policy import Policy
from steptron.monitor.statistics.reduced_stats import register_vitals
from steptron.monitor.statistics.registry import Registry
from steptron.monitor.storage import ledger
from steptron.monitor.storage.database import vital_planes

Planes = Iterable[tuple[int, Registry, np.ndarray]]
Verdict = Literal["same", "differs", "not in the ledger", "ledger only", "file lost", "no plane"]

DIFFERENT: tuple[Verdict, ...] = ("differs", "not in the ledger", "ledger only", "file lost")
JUDGED = ("alarm", "alarm_cleared", "decision")
"""The events that are replayed."""


@dataclass(frozen=True, kw_only=True)
class SkippedStep:
    """A step that does not count, because it caused a rewind or a stop."""

    step: int
    """The step that was judged."""
    file: str
    """The path of the evidence, relative to the run folder."""
    in_force: dict[str, Any]
    """The evidence of the `detectors` event."""
    events: list[dict[str, Any]]
    """The alarms of the step, and its decision."""


@dataclass(kw_only=True)
class Timeline:
    """The ledger without the steps that were undone."""

    in_force: dict[int, dict[str, Any]] = field(default_factory=dict)
    """The evidence of `detectors` events, by the step from which they hold."""
    newest: dict[str, Any] = field(default_factory=dict)
    """The evidence of the `detectors` event of the process that wrote the last line."""
    held: list[SkippedStep] = field(default_factory=list)
    """The kept evidence in the order of the ledger, including steps that were undone."""
    stages: list[tuple[int, str]] = field(default_factory=list)
    """The last step before each stage, and the stage's name."""
    rewinds: list[int] = field(default_factory=list)
    """The steps that the run was rewound to, in the order of the rewinds."""
    judged: dict[int, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    """The alarms and decisions by step."""
    inherited: dict[str, Any] | None = None
    """The state of detectors and policy that a fork began with. None: the run began at its first step."""
    undone: int = 0
    """Alarms and decisions in steps that were undone."""

    def undo_after(self, step: int) -> None:
        """Undo the steps after `step`, from which the run continues."""
        self.in_force = {at: event for at, event in self.in_force.items() if at <= step}
        self.stages = [(at, name) for at, name in self.stages if at <= step]
        for later in [at for at in self.judged if at > step]:
            self.undone += len(self.judged.pop(later))

    def stage(self, step: int) -> str:
        """Return the stage of a step."""
        return next((name for before, name in reversed(self.stages) if before < step), "")

    def rewinds_before(self, step: int) -> int:
        """Return the number of rewinds before the run reached the step for the last time."""
        return max((number for number, to in enumerate(self.rewinds, start=1) if to < step), default=0)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One alarm or decision, as replayed and as in the ledger."""

    step: int
    event: str
    evidence: dict[str, Any]
    verdict: Verdict


def timeline(events: Iterable[dict[str, Any]]) -> Timeline:
    """Build the timeline from the ledger's events, in the order in which they were written."""
    line = Timeline()
    for event in events:
        kind, step = event["event"], int(event["step"])
        if kind == "resume":
            line.undo_after(step)
        elif kind == "rewind":
            line.undo_after(int(event["to"]))
            line.rewinds.append(int(event["to"]))
            if line.newest:  # the process continues, perhaps from a step before its own start
                line.in_force[int(event["to"])] = line.newest
        elif kind == "fork":
            line.inherited = event["guard"]
        elif kind == "detectors":
            line.in_force[step] = line.newest = event
        elif kind == "stage_start":
            line.stages.append((step, event["stage"]))
        elif kind in JUDGED:
            line.judged[step].append(event)
            if "judged" in event:
                events = line.judged.pop(step)
                line.held.append(SkippedStep(step=step, file=event["judged"], in_force=line.newest, events=events))
    return line


def replay(run_dir: Path, console: Console | None = None) -> int:
    """Decide a run's steps again, and print a table of the comparison.

    Returns:
        0, or 3 if a decision differs from the ledger's. Raises `SteptronError` if there is nothing to replay.
    """
    line = timeline(ledger.read(run_dir))
    if not line.in_force:
        raise SteptronError(f"{run_dir}/{ledger.FILE_NAME} has no event 'detectors': there is no decision to replay")
    recipe = load_run(run_dir)
    steps: list[int] = []
    planes = vital_planes(recipe.monitor.store or run_dir / "metrics")
    lines = [found for held in line.held for found in _judge_again(held, run_dir)]
    lines = sorted([*lines, *judge(line, _noting(planes, steps))], key=lambda found: found.step)
    if not steps and not line.held:
        raise SteptronError(
            f"{run_dir} has no vital planes: they are stored with monitor.level=light or full, "
            f"this run had {recipe.monitor.level}"
        )
    out = console or Console(soft_wrap=True)
    out.print(_table(lines))
    different = sum(found.verdict in DIFFERENT for found in lines)
    out.print(_summary(lines, steps, line, different), highlight=False)
    return 3 if different else 0


def judge(line: Timeline, planes: Planes) -> Iterator[Line]:
    """Run detectors and policy on the planes, and yield the results beside those of the ledger."""
    watch: tuple[Detectors, Policy] | None = None
    left = {step: list(events) for step, events in line.judged.items()}
    started = -1
    for step, registry, plane in planes:
        start = max((at for at in line.in_force if at < step), default=None)
        if start is None:
            continue
        if start != started or watch is None:
            state = {"detectors": watch[0].state(), "policy": watch[1].state()} if watch else line.inherited
            watch, started = _start(line.in_force[start], state), start
        detectors, policy = watch
        policy.spent(line.rewinds_before(step))
        decision = policy.decide(step, detectors.observe(step, line.stage(step), registry, plane))
        yield from _compare(step, decision.events(), left.pop(step, []))
    for step, events in sorted(left.items()):
        for event in events:
            yield Line(step=step, event=event["event"], evidence=event, verdict="no plane")


def _judge_again(held: SkippedStep, run_dir: Path) -> Iterator[Line]:
    """Judge a step that does not count, from its kept evidence."""
    try:
        judged = ledger.Judged.read(run_dir / held.file)
        detectors, policy = _start(held.in_force, None)
        detectors.restore(judged.detectors)
        policy.restore(judged.policy)
        registry, plane = _laid_out(judged.values, decode(Surroundings, held.in_force["around"], "around"))
    except (ValueError, KeyError):
        for event in held.events:
            yield Line(step=held.step, event=event["event"], evidence=event, verdict="file lost")
        return
    decision = policy.decide(held.step, detectors.observe(held.step, judged.stage, registry, plane))
    yield from _compare(held.step, decision.events(), held.events)


def _laid_out(values: Mapping[str, np.ndarray], around: Surroundings) -> tuple[Registry, np.ndarray]:
    """Return a vital plane with these values, and its registry.

    Raises `KeyError` or `ValueError` if values are missing.
    """
    registry = Registry()
    register_vitals(registry, around.layers if around.level != "off" else (), around.num_experts, around.world_size)
    plane = registry.new_plane()
    for name in registry.statistics:
        registry.view(plane, name)[...] = values[name]
    return registry, plane


def _start(event: dict[str, Any], state: Mapping[str, Any] | None) -> tuple[Detectors, Policy]:
    """Start as a process does: with new detectors and policy, then with their state from the checkpoint."""
    detectors = Detectors(decode(DetectorsConfig, event["detectors"]), decode(Surroundings, event["around"], "around"))
    policy = Policy(decode(PolicyConfig, event["policy"]))
    if state is not None:
        detectors.restore(state["detectors"])
        policy.restore(state["policy"])
    return detectors, policy


def _compare(step: int, replayed: list[tuple[str, dict[str, Any]]], written: list[dict[str, Any]]) -> Iterator[Line]:
    """Compare the events of one step: each replayed one with the one of its kind, detector and place."""
    open_ = list(written)
    for kind, evidence in replayed:
        partner = next((event for event in open_ if _key(event["event"], event) == _key(kind, evidence)), None)
        verdict: Verdict = "not in the ledger"
        if partner is not None:
            open_.remove(partner)
            # The ledger may contain more than the evidence, such as the time or the name of a gradient.
            verdict = "same" if _text(evidence) == _text({name: partner.get(name) for name in evidence}) else "differs"
        yield Line(step=step, event=kind, evidence=evidence, verdict=verdict)
    for event in open_:
        yield Line(step=step, event=event["event"], evidence=event, verdict="ledger only")


def _key(kind: str, evidence: dict[str, Any]) -> tuple[str, Any, str]:
    return kind, evidence.get("detector"), _text(evidence.get("where"))


def _text(value: Any) -> str:
    """Return a value as it is written to a file, where NaN equals NaN."""
    return json.dumps(value, sort_keys=True)


def _noting(planes: Planes, steps: list[int]) -> Planes:
    for step, registry, plane in planes:
        steps.append(step)
        yield step, registry, plane


def _table(lines: list[Line]) -> Table:
    table = Table(box=None, header_style="bold")
    for name in ("step", "event", "detector", "where", "value", "threshold", "act", "ledger"):
        table.add_column(name, justify="right" if name in ("step", "value", "threshold") else "left")
    for line in lines:
        of = line.evidence
        where = " ".join(f"{axis} {value}" for axis, value in (of.get("where") or {}).items())
        numbers = [
            f"{of[name]:.5g}" if isinstance(of.get(name), int | float) else "" for name in ("value", "threshold")
        ]
        detector = str(of.get("detector") or " ".join(of.get("detectors") or []))
        act = str(of.get("act", ""))
        style = "red" if line.verdict in DIFFERENT else ""
        table.add_row(str(line.step), line.event, detector, where, *numbers, act, line.verdict, style=style)
    return table


def _summary(lines: list[Line], steps: list[int], line: Timeline, different: int) -> str:
    parts = [f"{len(steps)} steps replayed, {len(lines)} alarms and decisions"]
    parts.append(f"{different} differ from the ledger" if different else "as in the ledger")
    if line.held:
        parts.append(f"{len(line.held)} steps more that were not to count, by what was kept of them")
    absent = steps[-1] - steps[0] + 1 - len(steps) if steps else 0
    if absent:
        parts.append(f"{absent} steps in between have no stored plane, what follows them may differ")
    without = sum(found.verdict == "no plane" for found in lines)
    if without:
        parts.append(f"{without} of steps without a stored plane")
    if line.undone:
        parts.append(f"{line.undone} more in steps that a resume or rewind has undone, which cannot be replayed")
    return "; ".join(parts)
