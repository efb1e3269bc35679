"""What every rank sees of a run, and decides alike; and what rank 0 shows and writes down.

backward ─► see: the plane's front, summed over all ranks ─► allows: detectors, policy ─► Decision ─► the loop carries it out
step     ─► the plane's copy ─► collector ─► metrics.jsonl, store or server, W&B       record ─► ledger.jsonl
close    ─► report.html
"""

import copy
import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from steptron.config.identity import Identity
from steptron.config.schema import Recipe, moe_layers
from steptron.monitor.dashboard.report import write_report
from steptron.monitor.detect import Detectors, Surroundings
from steptron.monitor.detect.policy import Decision, Policy, in_force
from steptron.monitor.sinks.collector import Collector, MakeSink
from steptron.monitor.sinks.metrics_jsonl import JsonlSink
from steptron.monitor.sinks.plane import PlaneSink
from steptron.monitor.sinks.progress import ProgressLine
from steptron.monitor.sinks.wandb import WandbSink
from steptron.monitor.statistics.frame import Alert, Scalar
from steptron.monitor.statistics.gather import Gather
from steptron.monitor.statistics.host_copy import HostCopies
from steptron.monitor.statistics.registry import Registry
from steptron.monitor.storage.ledger import Judged, Ledger
from steptron.parallel.mesh import Meshes
from steptron.parallel.network import Network
from steptron.train.instrumentation import Seen, not_finite
from steptron.train.step import StepResult

log = logging.getLogger("steptron")

HOLDS = ("skip", "rewind", "stop")
"""Acts after which a step's update is not made."""


class Watch:
    """One a rank: the judge of its steps."""

    decision: Decision
    """On the last step."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        ours: Identity,
        meshes: Meshes,
        seen: Seen,
        *,
        tokens: int,
        resumed: int | None,
    ):
        """`ours`: who the run is, the same on all ranks · `tokens`: trained on before · `resumed`: step of the checkpoint the run goes on
        from (None: a new run)."""
        self._folder, self._seen, self._plane = folder, seen, seen.plane
        self._rank, world_size = dist.get_rank(), meshes.layout.world_size
        self.last_step = resumed or 0
        self._stage = ""
        self._times, self._brief = (0.0, 0.0, 0.0), False
        around = Surroundings(
            layers=tuple(moe_layers(recipe.model)),
            num_experts=recipe.model.moe.num_experts,
            top_k=recipe.model.moe.top_k,
            ep=meshes.layout.expert["ep"],
            world_size=world_size,
            level=recipe.monitor.level,
        )
        self._in_force = in_force(recipe.monitor.detectors, recipe.monitor.policy, around)
        self._detectors = Detectors(recipe.monitor.detectors, around)
        self._policy = Policy(recipe.monitor.policy)
        self._limit = recipe.monitor.policy.limit
        self._clipped: set[int] = set()
        self._vital = seen.plane.vital.clone()
        first = self._rank == 0
        alone = world_size == 1 or recipe.monitor.level != "full" or recipe.monitor.wandb.mode == "disabled"
        self._whole = None if alone else Gather(seen.plane.registry, seen.plane.values.device)
        told = seen.plane.registry if self._whole is None else self._whole.registry
        sinks = _sinks(recipe, folder, ours, self._rank, world_size, seen.plane.registry, told, resumed)
        stores = recipe.monitor.level == "full" or (first and recipe.monitor.level == "light")
        registry = seen.plane.registry
        slots = registry.slots - (0 if first else registry.vital_slots)
        self._outbox = HostCopies(slots, seen.plane.values.device) if stores else None
        self._collector = Collector(sinks, resumed)
        self._ledger = Ledger(folder) if first else None
        budgets = {name: stage.tokens for name, stage in recipe.stages.items()}
        self._progress = ProgressLine(budgets, tokens, Console()) if first else None

    # What the step asks.

    @property
    def slots(self) -> int:
        """Values a step of this rank."""
        return self._plane.registry.slots

    def begin_run(self) -> None:
        """Write down what decisions will rest on."""
        self.record("detectors", self.last_step, **self._in_force)

    def begin(self, stage: str) -> None:
        """The next step is of that stage."""
        self._stage = stage

    def see(self, squares_P: Tensor) -> None:
        """Complete the plane's front after backward, and sum it over all ranks."""
        self._seen.after_backward(squares_P)
        for name, value in zip(("step_time", "data_wait", "communication_time"), self._times, strict=True):
            self._plane.view(name)[self._rank].fill_(value)
        self._plane.view("not_finite")[self._rank] = not_finite(squares_P)
        self._broken_P = ~torch.isfinite(squares_P)
        self._vital.copy_(self._plane.vital)
        dist.all_reduce(self._vital)

    def allows(self, result: StepResult) -> bool:
        """Ask detectors and policy; False where the update is not to be made, or where a router's logits were not finite."""
        scalars = {name: result.terms[name] for name in ("loss", "total_loss")} | {"grad_norm": result.grad_norm}
        for name, value in scalars.items():
            self._plane.registry.view(self._vital, name).fill_(value)
        vital = self._vital.cpu().numpy()
        step = self.last_step + 1
        # A step that is not to count must leave no trace in what a checkpoint keeps: a resumed run judges it anew.
        self._before = copy.deepcopy((self._detectors, self._policy))
        alarms = self._detectors.observe(step, self._stage, self._plane.registry, vital)
        self.decision = self._policy.decide(step, alarms)
        # The loop does not come to `step`: no plane will have what this was judged by.
        held = result.broken is not None or self.decision.act in ("rewind", "stop")
        self._announce(step, self._keep(step, vital) if held else None)
        return self.decision.act not in HOLDS and result.broken is None

    # What the loop tells.

    def record(self, event: str, step: int, **evidence: object) -> None:
        """A line in rank 0's ledger, and in every rank's log."""
        if self._ledger is not None:
            self._ledger.write(event, step, **evidence)
        log.info("%s at step %d %s", event, step, evidence)

    def step(
        self, metrics: Mapping[str, Scalar], by_source: Mapping[str, int], data_wait: float, waited: float
    ) -> None:
        """One step's numbers, those of all ranks; of this rank the seconds it waited for data and in collectives."""
        self.last_step = int(metrics["step"] or 0)
        self._times = (float(metrics["step_time"] or 0.0), data_wait, waited)
        parcel = whole = None
        if self._outbox is not None:
            vital_slots = self._plane.registry.vital_slots
            self._plane.vital.copy_(self._vital)
            parcel = whole = self._outbox.send(self._plane.values[vital_slots if self._rank else 0 :])
        if self._whole is not None:
            whole = self._whole.send(self._plane.values)
        self._plane.reset()
        self._collector.step(metrics, by_source, parcel, whole)
        if self._progress is not None:
            self._progress.update(metrics)

    def undo(self) -> None:
        """The step that was judged last is not to count."""
        self._detectors, self._policy = self._before

    def go_back(self, step: int, state: Mapping[str, Any]) -> None:
        """The run is rewound to `step`, where this was the state."""
        self._plane.reset()
        self.last_step, self._times = step, (0.0, 0.0, 0.0)
        self.restore(state)
        self._collector.truncate_after(step)

    def apply_limits(self, network: Network) -> None:
        """Activation limits that the policy has switched on; a stage's own limit holds where it is lower."""
        for layer, moe in network.moe_layers().items():
            if layer in self._clipped:
                moe.experts.limit = min(self._limit, moe.experts.limit or self._limit)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON-able."""
        return {
            "detectors": self._detectors.state(),
            "policy": self._policy.state(),
            "clipped_layers": sorted(self._clipped),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state; an empty one is that of a new run."""
        if state:
            self._detectors.restore(state["detectors"])
            self._policy.restore(state["policy"])
            self._clipped = set(state["clipped_layers"])

    def spent_rewinds(self, rewinds: int) -> None:
        """The ledger knows of so many rewinds, also of those since the checkpoint."""
        self._policy.spent(rewinds)

    def flush(self) -> None:
        """Put everything on disk, before a checkpoint."""
        self._collector.flush()

    def be_brief(self) -> None:
        """There is no time left for a report at the end."""
        self._brief = True

    def close(self) -> None:
        """End the progress line, close the sinks and write the report; also when the run ends early."""
        if self._progress is not None:
            self._progress.close()
        self._collector.close()
        if self._outbox is not None and self._outbox.dropped:
            log.warning(
                "%d steps' statistics were dropped: writing them took longer than the steps", self._outbox.dropped
            )
        if self._rank or self._brief:
            return
        try:
            path = write_report(self._folder)
        except Exception as error:  # how the run ended matters more than its picture
            log.warning("the report cannot be written: %s", error)
        else:
            print(f"report: {path}")

    def _keep(self, step: int, vital: np.ndarray) -> str | None:
        """Put down what the step was judged by, on rank 0: the file's place in the run folder."""
        if self._ledger is None:
            return None
        registry, (detectors, policy) = self._plane.registry, self._before
        vitals = [name for name, statistic in registry.statistics.items() if statistic.vital]
        judged = Judged(
            stage=self._stage,
            detectors=detectors.state(),
            policy=policy.state(),
            values={name: registry.view(vital, name) for name in vitals},
        )
        return self._ledger.keep(step, judged)

    def _announce(self, step: int, judged: str | None) -> None:
        """What is new, and what is done, to ledger, log and people; a layer to be clipped is so from the next step on."""
        decision = self.decision
        for event, evidence in decision.events():
            more = {"judged": judged} if judged and event == "decision" else {}
            self.record(event, step, **evidence, **more)
        for alarm in decision.alarms:
            if not alarm.new:
                continue
            whose = self._whose_gradients() if alarm.detector == "not_finite" else ""
            text = "; ".join(part for part in (alarm.text, whose, f"act: {decision.act}") if part)
            log.warning("step %d: %s: %s", step, alarm.detector, text)
            self._collector.alert(Alert(step=step, title=alarm.detector, text=text, severe=decision.act in HOLDS))
        self._clipped.update(decision.clip_layers)

    def _whose_gradients(self) -> str:
        """The first gradient that is not finite, of the first rank that holds one, whoever made it. All ranks call it."""
        mine = None
        if self._broken_P.any():
            mine = self._seen.parameters[int(self._broken_P.nonzero()[0])]
        all_: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(all_, mine)
        found = [(rank, name) for rank, name in enumerate(all_) if name is not None]
        return f"first: {found[0][1]}, held by rank {found[0][0]}" if found else ""


def _sinks(
    recipe: Recipe,
    folder: Path,
    ours: Identity,
    rank: int,
    world_size: int,
    registry: Registry,
    told: Registry,
    resumed: int | None,
) -> dict[str, MakeSink]:
    """What this rank writes to, by name. `told`: the layout of what W&B gets."""
    config, sinks = recipe.monitor, {}
    if rank == 0:
        sinks["metrics.jsonl"] = lambda: JsonlSink(folder)
    registry = registry if rank == 0 else registry.own()
    if config.level == "off" or registry.slots == 0:
        return sinks
    store = config.store or str(folder / "metrics")
    writers = world_size if config.level == "full" else 1
    if config.server.addresses:
        from steptron.monitor.sinks.server import ServerSink  # Arrow Flight takes its time to import

        sinks["the metrics server"] = lambda: ServerSink(
            folder,
            config.server,
            recipe.run.name,
            registry,
            uid=ours.id,
            attempt=ours.attempt,
            rank=rank,
            writers=writers,
            resumed=resumed,
        )
    else:
        sinks["the metrics plane"] = lambda: PlaneSink(store, registry, config.flush_every, rank, writers)
    if rank == 0 and config.wandb.mode != "disabled":
        values = dataclasses.asdict(recipe)
        sinks["W&B"] = lambda: WandbSink(folder, config.wandb, ours.id, recipe.run.name, values, told)
    return sinks
