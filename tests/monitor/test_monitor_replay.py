"""A run's ledger against its own planes: right as it is, found out where it is tampered with."""

import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from fake_run import make_recipe
from rich.console import Console
from steptron.config.detectors import ActsConfig, DetectorsConfig, LossSpikeConfig, PolicyConfig
from steptron.config.resolve import to_yaml
from steptron.errors import SteptronError
from steptron.monitor.detect import Detectors
from steptron.monitor.detect.policy import Policy, in_force
from steptron.monitor.detect.replay import replay
from steptron.monitor.storage.ledger import Judged, Ledger
from steptron.monitor.storage.store import Store
from vital_traces import Trace, Values

STAGES = (("base", 70), ("long", 10**9))


class Run:
    """A training loop as monitoring sees it: checkpoints every 20 steps, and losses that are read from a data order."""

    def __init__(self, folder: Path, policy: PolicyConfig, detectors: DetectorsConfig | None = None):
        folder.mkdir(exist_ok=True)
        self.folder, self.ledger, self.trace = (
            folder,
            Ledger(folder),
            Trace(3, layers=(1, 2), num_experts=8, stages=STAGES),
        )
        self.config, self.detectors_config = policy, detectors or DetectorsConfig()
        self.store = Store(folder / "metrics", "rank-00000", self.trace.registry, flush_every=10)
        self.checkpoints: dict[int, tuple[dict, dict]] = {}
        self.acts: list[tuple[int, str]] = []
        recipe = make_recipe(folder)
        model = dataclasses.replace(recipe.model, num_mtp_heads=1, max_positions=16384)
        (folder / "recipe.yaml").write_text(to_yaml(dataclasses.replace(recipe, model=model)))
        self.start(0, None)

    def start(self, step: int, checkpoint: tuple[dict, dict] | None) -> None:
        """A process, at its first step or resumed."""
        self.step, self.stage = step, ""
        self.detectors = Detectors(self.detectors_config, self.trace.around)
        self.policy = Policy(self.config)
        if checkpoint is not None:
            self.detectors.restore(checkpoint[0])
            self.policy.restore(checkpoint[1])
            self.store.truncate_after(step)
        self.ledger.write("resume" if checkpoint else "run_start", step)
        self.ledger.write("detectors", step, **in_force(self.detectors_config, self.config, self.trace.around))

    def resume(self, step: int) -> None:
        self.start(step, self.checkpoints[step])

    def steps(self, last: int, fault=lambda step, values: None, store: bool = True) -> None:
        """Train up to `last`; a rewind goes back to the newest checkpoint, and finds the fault gone."""
        while self.step < last:
            step = self.step + 1
            stage = self.trace.stage(step)
            if stage != self.stage:
                self.ledger.write("stage_start", self.step, stage=stage)
                self.stage = stage
            values = self.trace.values(step)
            fault(step, values)
            plane = self.trace.plane(values)
            before = json.loads(json.dumps((self.detectors.state(), self.policy.state())))
            decision = self.policy.decide(step, self.detectors.observe(step, stage, self.trace.registry, plane))
            more = {}
            if decision.act in ("rewind", "stop"):
                judged = Judged(stage=stage, detectors=before[0], policy=before[1], values=values)
                more = {"judged": self.ledger.keep(step, judged)}
            for event, evidence in decision.events():
                kept = more if event == "decision" else {}
                self.ledger.write(event, step, gradient="layers.1.weight", **evidence, **kept)
            self.acts.append((step, decision.act))
            if decision.act == "stop":
                self.checkpoints[self.step] = before
                break
            if decision.act == "rewind":
                self.step, fault = max(self.checkpoints), lambda step, values: None
                self.detectors.restore(self.checkpoints[self.step][0])
                self.policy.restore(self.checkpoints[self.step][1])
                self.store.truncate_after(self.step)
                self.ledger.write("rewind", step, to=self.step)
                self.stage = ""
                continue
            if store:
                self.store.add(step, plane)
            self.step = step
            if step % 20 == 0:
                self.checkpoints[step] = json.loads(json.dumps((self.detectors.state(), self.policy.state())))
        self.store.flush()

    def due(self) -> list[tuple[int, str]]:
        return [(step, act) for step, act in self.acts if act != "ignore"]


def _troubles(step: int, values: Values) -> None:
    if step in (52, 96):
        values["loss"] += 2.0
    if step in (60, 61, 62):
        values["grad_norm"], values["not_finite"][1] = math.nan, 3
    if step >= 75:
        values["out_norm_sum"][1, 4] *= 40


def _replayed(folder: Path) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=250)
    code = replay(folder, console)
    assert isinstance(console.file, io.StringIO)
    return code, console.file.getvalue()


def _rewrite(folder: Path, change) -> None:
    """Apply `change` to each event; None leaves it out."""
    path = folder / "ledger.jsonl"
    events = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(event) + "\n" for event in events if event is not None))


POLICY = PolicyConfig(actions=ActsConfig(blow_up="clip"))


def test_a_run_decides_again_what_it_decided(tmp_path):
    run = Run(tmp_path, POLICY)
    run.steps(120, _troubles)
    skipped = [(60, "skip"), (61, "skip"), (62, "skip")]
    assert run.due() == [(52, "warn"), *skipped, (77, "clip"), (96, "warn")]
    code, text = _replayed(tmp_path)
    assert code == 0, text
    assert "120 steps replayed" in text
    assert "as in the ledger" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["77", "alarm", "blow_up", "layer", "2", "expert", "4"] in [row[:7] for row in rows]
    assert sum(row[-1:] == ["same"] for row in rows) == 11  # 4 alarms, 3 cleared, 3 skips, a clip


TAMPERED = {
    "another value": lambda e: {**e, "value": e["value"] + 1e-9} if e["event"] == "alarm" and e["step"] == 52 else e,
    "another place": lambda e: {**e, "where": {"layer": 2, "expert": 5}} if e.get("detector") == "blow_up" else e,
    "another act": lambda e: {**e, "act": "warn"} if e["event"] == "decision" and e["step"] == 61 else e,
    "a decision left out": lambda e: None if e["event"] == "decision" and e["step"] == 62 else e,
    "a decision at another step": lambda e: {**e, "step": 78} if e["event"] == "decision" and e["step"] == 77 else e,
    "another stage": lambda e: {**e, "step": 93} if e["event"] == "stage_start" and e["stage"] == "long" else e,
    "another threshold": lambda e: (
        {**e, "detectors": {**e["detectors"], "blow_up": {**e["detectors"]["blow_up"], "raise_after_steps": 4}}}
        if e["event"] == "detectors"
        else e
    ),
}


@pytest.mark.parametrize("change", TAMPERED.values(), ids=TAMPERED)
def test_a_ledger_that_says_something_else_is_found_out(tmp_path, change):
    Run(tmp_path, POLICY).steps(120, _troubles)
    _rewrite(tmp_path, change)
    code, text = _replayed(tmp_path)
    assert code == 3, text
    assert "differ from the ledger" in text


def _stopped(folder: Path) -> Run:
    """Two rewinds are allowed, the third is a stop; with more of them the run goes on."""
    run = Run(folder, PolicyConfig(actions=ActsConfig(loss_spike="rewind"), rewinds=2))
    run.steps(47)
    for bad in (48, 55, 105):
        run.steps(bad, lambda step, values, bad=bad: values.update(loss=9.0) if step == bad else None)
    assert run.due() == [(48, "rewind"), (55, "rewind"), (105, "stop")]
    run.config = dataclasses.replace(run.config, rewinds=3)
    run.resume(104)
    run.steps(110)
    return run


def test_rewinds_and_stops_are_decided_again_though_their_steps_do_not_count(tmp_path):
    _stopped(tmp_path)
    code, text = _replayed(tmp_path)
    assert code == 0, text
    assert "3 steps more that were not to count" in text
    assert "undone" not in text
    rows = [line.split() for line in text.splitlines()]
    assert [(row[0], *row[-2:]) for row in rows if row[1:2] == ["decision"]] == [
        ("48", "rewind", "same"),
        ("55", "rewind", "same"),
        ("105", "stop", "same"),
    ]
    assert "2 rewinds were made" in (tmp_path / "ledger.jsonl").read_text()


def _changed(path: Path, **values) -> None:
    with np.load(path) as file:
        np.savez_compressed(path, **{name: values.get(name, file[name]) for name in file.files})


SPOILED = {
    "another value": (lambda path: _changed(path, loss=np.float32(8.5)), "differs"),
    "a usual value": (lambda path: _changed(path, loss=np.float32(5.1 if "48" in path.name else 3.2)), "ledger only"),
    "lost": (lambda path: path.unlink(), "file lost"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:900]), "file lost"),
    "without a value": (lambda path: np.savez_compressed(path, about=np.load(path)["about"]), "file lost"),
}


@pytest.mark.parametrize("step", [48, 105], ids=["rewind", "stop"])
@pytest.mark.parametrize(("spoil", "verdict"), SPOILED.values(), ids=SPOILED)
def test_what_a_rewind_or_stop_was_judged_by_is_found_out_when_it_is_spoiled(tmp_path, spoil, verdict, step):
    _stopped(tmp_path)
    spoil(tmp_path / "judged" / f"step-{step:08d}.npz")
    code, text = _replayed(tmp_path)
    assert code == 3, text
    assert [line.split()[0] for line in text.splitlines() if line.rstrip().endswith(verdict)] == [str(step)] * 2, text


def test_a_rewind_past_the_start_of_its_process_is_judged_by_that_process(tmp_path):
    def bump(step: int, values: Values) -> None:
        values["loss"] += {66: 9.0, 68: 1.4}.get(step, 0.0)

    run = Run(tmp_path, PolicyConfig(actions=ActsConfig(loss_spike="rewind")))
    run.steps(60)
    run.detectors_config = dataclasses.replace(run.detectors_config, loss_spike=LossSpikeConfig(min_up=3.0))
    run.resume(60)
    run.checkpoints = {40: run.checkpoints[40]}  # the one of step 60 is damaged
    run.steps(66, bump)
    run.steps(70, bump)
    assert run.due() == [(66, "rewind")]
    code, text = _replayed(tmp_path)
    assert code == 0, text


def test_a_resume_with_other_thresholds_is_judged_by_each_in_its_time(tmp_path):
    def bumps(step: int, values: Values) -> None:
        values["loss"] += {52: 1.4, 66: 1.4, 68: 6.0}.get(step, 0.0)

    run = Run(tmp_path, POLICY)
    run.steps(69, bumps)
    run.detectors_config = dataclasses.replace(run.detectors_config, loss_spike=LossSpikeConfig(min_up=3.0))
    run.resume(60)
    run.steps(69, bumps)
    assert run.due() == [(52, "warn"), (66, "warn"), (68, "warn")], (
        "66 before the change, 68 after it, by what the checkpoint remembers"
    )
    code, text = _replayed(tmp_path)
    assert code == 0, text
    assert "69 steps replayed" in text


def test_a_fork_is_judged_by_what_its_parent_remembers(tmp_path):
    parent, fork = Run(tmp_path / "parent", POLICY), Run(tmp_path / "fork", POLICY)
    parent.steps(69, _troubles)
    detectors, policy = parent.checkpoints[40]
    (fork.folder / "ledger.jsonl").unlink()
    fork.ledger.write("fork", 40, guard={"detectors": detectors, "policy": policy})
    fork.start(40, (detectors, policy))
    fork.steps(69, _troubles)
    assert fork.due() == parent.due() == [(52, "warn"), (60, "skip"), (61, "skip"), (62, "skip")]
    code, text = _replayed(fork.folder)
    assert code == 0, text
    _rewrite(fork.folder, lambda event: None if event["event"] == "fork" else event)
    assert _replayed(fork.folder)[0] == 3, "without its parent's past a loss of step 52 is not judged alike"


def test_clip_that_a_resume_brings_in_limits_all_sick_layers_over_restarts(tmp_path):
    def sick(step: int, values: Values) -> None:
        if step >= 50:
            factor = 40.0 if step <= 60 or step > 80 else 5.0  # in between neither bad nor over it
            for layer, expert in ((0, 2), (1, 4)):
                norm_E = values["out_norm_sum"][layer] / np.maximum(values["rows"][layer], 1)
                values["out_norm_sum"][layer, expert] = factor * np.median(norm_E) * values["rows"][layer, expert]

    run = Run(tmp_path, PolicyConfig())
    run.steps(60, sick)
    run.config = POLICY
    for last in (80, 90):
        run.resume(run.step)
        run.steps(last, sick)
    clips = [(step, act) for step, act in run.due() if act == "clip"]
    events = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert clips == [(81, "clip")]
    assert [event["clip_layers"] for event in events if event["event"] == "decision"] == [[1, 2]]
    code, text = _replayed(tmp_path)
    assert code == 0, text


def test_steps_without_a_plane_are_told_apart(tmp_path):
    run = Run(tmp_path, POLICY)
    run.steps(51)
    run.steps(53, _troubles, store=False)
    code, text = _replayed(tmp_path)
    assert code == 0, text
    assert "no plane" in text
    assert "1 of steps without a stored plane" in text


def test_a_step_of_which_rank_0_has_dropped_its_plane_is_not_judged(tmp_path):
    """Other ranks store rows of the same tables, in which the values of rank 0 are missing, not NaN losses."""
    run = Run(tmp_path, POLICY)
    run.steps(30)
    run.store.add(31, np.full(run.trace.registry.slots, np.nan, np.float32))
    run.step = 31
    run.steps(53, _troubles)
    assert run.due(), "later decisions are compared"
    code, text = _replayed(tmp_path)
    assert code == 0, text
    assert "1 steps in between have no stored plane" in text


def test_where_there_is_nothing_to_replay_it_says_so(tmp_path):
    with pytest.raises(SteptronError, match="no event 'detectors'"):
        replay(tmp_path)
    Run(tmp_path, POLICY)
    with pytest.raises(SteptronError, match="no vital planes"):
        replay(tmp_path)
