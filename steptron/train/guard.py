"""The judge of every step: detectors and policy turn the step's statistics into a decision, the same on all ranks.

    backward ─► see: vital statistics, summed over all ranks ─► allows: detectors ─► policy ─► Decision ─► loop.py

Legend: P parameters of this rank.
"""

import copy
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from steptron.config.monitoring import MonitorConfig
from steptron.monitor.detect import Detectors, Surroundings
from steptron.monitor.detect.policy import Decision, Policy, in_force
from steptron.monitor.statistics.frame import Alert
from steptron.monitor.storage.ledger import Judged
from steptron.parallel.network import Network
from steptron.train.instrumentation import Instruments, not_finite
from steptron.train.recorder import TIMES, Recorder
from steptron.train.step import StepResult

log = logging.getLogger("steptron")

HOLDS = ("skip", "rewind", "stop")
"""The actions that prevent the update of a step."""


class Guard:
    """The guard of one rank. All ranks' guards see the same values and decide the same."""

    def __init__(self, config: MonitorConfig, around: Surroundings, instruments: Instruments, recorder: Recorder):
        self.in_force = in_force(config.detectors, config.policy, around)
        """The thresholds, the policy and the surroundings that decisions rest on, for the ledger."""
        self.step = recorder.last_step
        """The step that is being judged, or was judged last."""
        self.decision = Decision(step=self.step, act="ignore", alarms=[], clip_layers=(), since=self.step, reason="")
        """The decision about that step."""
        self.vital = instruments.plane.vital.clone()
        """The vital statistics of that step, float32, summed over all ranks."""
        self._stage = ""
        self._detectors, self._policy = Detectors(config.detectors, around), Policy(config.policy)
        self._before = self._detectors, self._policy
        self._limit = config.policy.limit
        self._clipped: set[int] = set()
        self._instruments, self._plane, self._recorder = instruments, instruments.plane, recorder
        self._broken_P = torch.zeros(0, dtype=torch.bool)

    def begin(self, step: int, stage: str) -> None:
        """Prepare for the next step, which belongs to this stage."""
        self.step, self._stage = step, stage

    def see(self, squares_P: Tensor) -> None:
        """Complete the vital statistics after backward, and sum them over all ranks."""
        self._instruments.after_backward(squares_P)
        self._plane.view("not_finite")[dist.get_rank()] = not_finite(squares_P)
        self._broken_P = ~torch.isfinite(squares_P)
        self.vital.copy_(self._plane.vital)
        dist.all_reduce(self.vital)

    def forget(self) -> None:
        """Clear the statistics of the step, which is repeated."""
        self._plane.reset(keep=TIMES)

    def allows(self, result: StepResult) -> bool:
        """Ask detectors and policy. Return False if the update must not be made, or if a router's logits were not
        finite."""
        scalars = {name: result.terms[name] for name in ("loss", "total_loss")} | {"grad_norm": result.grad_norm}
        for name, value in scalars.items():
            self._plane.registry.view(self.vital, name).fill_(value)
        vital = self.vital.cpu().numpy()
        # A step that does not count must leave no trace in the state of a checkpoint: a resumed run judges it anew.
        self._before = copy.deepcopy((self._detectors, self._policy))
        alarms = self._detectors.observe(self.step, self._stage, self._plane.registry, vital)
        self.decision = self._policy.decide(self.step, alarms)
        # No plane of such a step is stored, so the ledger keeps what it was judged by.
        held = result.broken is not None or self.decision.act in ("rewind", "stop")
        self._announce(self._keep_evidence(vital) if held else None)
        return self.decision.act not in HOLDS and result.broken is None

    def undo(self) -> None:
        """Forget the step that was judged last, because it does not count."""
        self._detectors, self._policy = self._before

    def apply_limits(self, network: Network) -> None:
        """Set the activation limits that the policy has switched on. A lower limit of the stage stays."""
        for layer, moe in network.moe_layers().items():
            if layer in self._clipped:
                moe.experts.limit = min(self._limit, moe.experts.limit or self._limit)

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON-able values."""
        return {
            "detectors": self._detectors.state(),
            "policy": self._policy.state(),
            "clipped_layers": sorted(self._clipped),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of a checkpoint. An empty one is that of a new run."""
        if state:
            self._detectors.restore(state["detectors"])
            self._policy.restore(state["policy"])
            self._clipped = set(state["clipped_layers"])

    def spent_rewinds(self, rewinds: int) -> None:
        """Note the number of rewinds in the ledger, which includes those since the checkpoint."""
        self._policy.spent(rewinds)

    def _keep_evidence(self, vital: np.ndarray) -> str | None:
        """Write what the step was judged by. Return the file's path in the run folder on rank 0, None on others."""
        registry, (detectors, policy) = self._plane.registry, self._before
        vitals = [name for name, statistic in registry.statistics.items() if statistic.vital]
        judged = Judged(
            stage=self._stage,
            detectors=detectors.state(),
            policy=policy.state(),
            values={name: registry.view(vital, name) for name in vitals},
        )
        return self._recorder.keep_evidence(self.step, judged)

    def _announce(self, judged: str | None) -> None:
        """Tell ledger, log and people of new alarms and of the decision. Layers to be clipped are so from the next step
        on."""
        decision = self.decision
        for event, evidence in decision.events():
            more = {"judged": judged} if judged and event == "decision" else {}
            self._recorder.record(event, self.step, **evidence, **more)
        for alarm in decision.alarms:
            if not alarm.new:
                continue
            whose = self._first_broken_gradient() if alarm.detector == "not_finite" else ""
            text = "; ".join(part for part in (alarm.text, whose, f"act: {decision.act}") if part)
            log.warning("step %d: %s: %s", self.step, alarm.detector, text)
            severe = decision.act in HOLDS
            self._recorder.alert(Alert(step=self.step, title=alarm.detector, text=text, severe=severe))
        self._clipped.update(decision.clip_layers)

    def _first_broken_gradient(self) -> str:
        """Return the name of the first gradient that is not finite, on the first rank that holds one. All ranks call
        it."""
        mine = None
        if self._broken_P.any():
            mine = self._instruments.parameters[int(self._broken_P.nonzero()[0])]
        all_: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(all_, mine)
        found = [(rank, name) for rank, name in enumerate(all_) if name is not None]
        return f"first: {found[0][1]}, held by rank {found[0][0]}" if found else ""
