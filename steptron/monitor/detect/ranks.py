"""Detectors of ranks: slow ranks, and ranks that wait for data.

Single steps of a rank are noise, and a single delay can be of any length. So both detectors look at many steps, each of
which has little weight.

Shape suffixes: R ranks, S last steps.
"""

import numpy as np

from steptron.config.detectors import DataStallConfig, StragglerConfig
from steptron.monitor.detect.alarm import Now, Surroundings
from steptron.monitor.detect.base import AlarmCell, Detector, Reading


class Straggler(Detector):
    """Detects slow ranks; see `StragglerConfig`. Each rank is a cell; all cells share an alarm."""

    name = "straggler"
    needs = ("step_time", "communication_time")
    kept = ("slow_SR",)

    def __init__(self, config: StragglerConfig, around: Surroundings):
        super().__init__(cells=around.world_size, group=around.world_size, steps=1, clear_steps=config.clear_steps)
        self._config = config
        self.slow_SR = np.zeros((config.window, around.world_size), dtype=bool)

    def read(self, now: Now) -> Reading | None:
        by = self._config
        time_R = now.values("step_time") - now.values("communication_time")
        # The lower of the two middle values: of two ranks it is the faster one, which a slow rank does not change.
        usual = float(np.sort(time_R)[(len(time_R) - 1) // 2]) if np.isfinite(time_R).all() else 0.0
        if usual <= 0.0 or len(time_R) < 2:
            return None
        slow_R = (time_R > by.ratio * usual) & (time_R - usual > by.seconds)
        self.slow_SR = np.concatenate([self.slow_SR[1:], slow_R[None]])
        count_R = self.slow_SR.sum(axis=0)

        def tell(rank: int) -> AlarmCell:
            count = int(count_R[rank])
            return AlarmCell(
                where={"rank": rank},
                value=float(count),
                threshold=float(by.slow),
                unit=f"steps of {by.window}",
                text=f"rank {rank} took more than {by.ratio:g} × the median rank's time "
                f"in {count} of the last {by.window} steps, "
                f"{time_R[rank] / usual:.3g} × ({time_R[rank]:.3g} s) in the last one; "
                f"the limit is {by.slow} steps",
            )

        # Of ranks that are slow equally often, the one that is slowest now comes first.
        severity = count_R + np.minimum(time_R / (time_R.max() + 1.0), 0.999)
        return Reading(bad=count_R >= by.slow, clean=count_R <= by.clear_slow, severity=severity, tell=tell)


class DataStall(Detector):
    """Detects ranks that wait for data; see `DataStallConfig`. Each rank is a cell; all cells share an alarm.

    Running means of wait ÷ step time and of seconds start at zero; the last step has weight 2/(steps + 1).
    """

    name = "data_stall"
    needs = ("step_time", "data_wait")
    kept = ("share_R", "seconds_R")

    def __init__(self, config: DataStallConfig, around: Surroundings):
        super().__init__(cells=around.world_size, group=around.world_size, steps=1, clear_steps=config.clear_steps)
        self._config = config
        self._weight = 2.0 / (config.raise_after_steps + 1)
        self.share_R = np.zeros(around.world_size)
        self.seconds_R = np.zeros(around.world_size)

    def read(self, now: Now) -> Reading | None:
        by = self._config
        time_R, wait_R = now.values("step_time"), now.values("data_wait")
        if not (np.isfinite(time_R).all() and np.isfinite(wait_R).all() and (time_R > 0).all()):
            return None
        share_R = np.clip(wait_R / time_R, 0.0, 1.0)
        self.share_R += self._weight * (share_R - self.share_R)
        self.seconds_R += self._weight * (share_R * time_R - self.seconds_R)

        def tell(rank: int) -> AlarmCell:
            value = float(self.share_R[rank])
            return AlarmCell(
                where={"rank": rank},
                value=value,
                threshold=by.share,
                unit="× step time",
                text=f"rank {rank} waits for data for {value:.0%} of the step, {self.seconds_R[rank]:.3g} s; "
                f"the limit is {by.share:.0%}",
            )

        return Reading(
            bad=(self.share_R > by.share) & (self.seconds_R > by.seconds),
            clean=(self.share_R < by.clear_share) | (self.seconds_R < by.seconds / 2),
            severity=self.share_R,
            tell=tell,
        )
