"""All detectors of a run, as one."""

from typing import Any

import numpy as np

from steptron.config.detectors import DetectorsConfig
from steptron.monitor.detect.alarm import Alarm, Now, Surroundings
from steptron.monitor.detect.base import Detector
from steptron.monitor.detect.experts import BlowUp, ExpertDeath, IdleExpert, RankOverload, RouterCollapse
from steptron.monitor.detect.ranks import DataStall, Straggler
from steptron.monitor.detect.spikes import GradNormSpike, LossSpike, NotFinite
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
    """All detectors of a run. Every rank has them and gives them the same planes, so all ranks get the same alarms."""

    def __init__(self, config: DetectorsConfig, around: Surroundings):
        self._watchers: list[Detector] = [kind(getattr(config, kind.name), around) for kind in _KINDS]
        self._stage = ""

    def observe(self, step: int, stage: str, registry: Registry, plane: np.ndarray) -> list[Alarm]:
        """Judge a step before its update. Detectors whose statistics are not registered are inactive.

        Args:
            step: the number of the step.
            stage: the name of its stage.
            registry: the meaning of the plane's slots.
            plane: float32, with the vital statistics in front, summed over all ranks.

        Returns:
            Alarms: each is returned when it is raised, again at each bad step while it lasts, and once when it is
            cleared.
        """
        now = Now(step=step, new_stage=stage != self._stage, registry=registry, plane=plane)
        self._stage = stage
        alarms: list[Alarm] = []
        # The detector not_finite judges infinities; for the others, the results of operations on them are unknown
        # values.
        with np.errstate(all="ignore"):
            for watcher in self._watchers:
                if all(name in registry for name in watcher.needs):
                    alarms += watcher.observe(now)
        return alarms

    def state(self) -> dict[str, Any]:
        """Return the state as JSON-able values, for checkpoints; after `restore`, detection continues seamlessly."""
        return {"stage": self._stage, **{watcher.name: watcher.state() for watcher in self._watchers}}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the result of `state`.

        State of other cells or windows (another number of ranks, a changed recipe) is discarded.
        """
        self._stage = state["stage"]
        for watcher in self._watchers:
            if watcher.name in state:
                watcher.restore(state[watcher.name])
