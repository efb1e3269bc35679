"""All detectors of a run, as one."""

from typing import Any

import numpy as np

from steptron.config.detectors import DetectorsConfig
from steptron.monitor.detect.alarm import Alarm, Now, Surroundings
from steptron.monitor.detect.experts import BlowUp, ExpertDeath, IdleExpert, RankOverload, RouterCollapse
from steptron.monitor.detect.ranks import DataStall, Straggler
from steptron.monitor.detect.spikes import GradNormSpike, LossSpike, NotFinite
from steptron.monitor.detect.watcher import Watcher
from steptron.monitor.statistics.registry import Registry

_KINDS: tuple[Any, ...] = (
    NotFinite,
    LossSpike,
    GradNormSpike,
    BlowUp,
    ExpertDeath,
    IdleExpert,
    RouterCollapse,
    RankOverload,
    Straggler,
    DataStall,
)


class Detectors:
    """All detectors of a run. Every rank has them and shows them the same planes, so all ranks get the same alarms."""

    def __init__(self, config: DetectorsConfig, around: Surroundings):
        self._watchers: list[Watcher] = [kind(getattr(config, kind.name), around) for kind in _KINDS]
        self._stage = ""

    def observe(self, step: int, stage: str, registry: Registry, plane: np.ndarray) -> list[Alarm]:
        """Judge a step, before its update. Detectors whose statistics are not registered are not active.

        Args:
            step: its number.
            stage: its stage's name.
            registry: what the slots mean.
            plane: float32; the vital statistics at its front, summed over all ranks.

        Returns:
            An alarm when it is raised, again at each bad step while it lasts, and once more when it is over.
        """
        now = Now(step=step, new_stage=stage != self._stage, registry=registry, plane=plane)
        self._stage = stage
        alarms: list[Alarm] = []
        # Sums of infinities and the like are judged by not_finite; for the others they are unknown.
        with np.errstate(all="ignore"):
            for watcher in self._watchers:
                if all(name in registry.statistics for name in watcher.needs):
                    alarms += watcher.observe(now)
        return alarms

    def state(self) -> dict[str, Any]:
        """JSON-able, for checkpoints: after `restore`, everything goes on as if nothing had happened."""
        return {"stage": self._stage, **{watcher.name: watcher.state() for watcher in self._watchers}}

    def restore(self, state: dict[str, Any]) -> None:
        """Inverse of `state`. What is of other cells or windows (another number of ranks, a changed recipe) starts
        anew."""
        self._stage = state["stage"]
        for watcher in self._watchers:
            if watcher.name in state:
                watcher.restore(state[watcher.name])
