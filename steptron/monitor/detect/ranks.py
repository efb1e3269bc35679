"""Detectors of ranks: slow ones, and such as wait for data. Shape suffix: R ranks.

Single steps of a rank are noise. Both judge running means that start from zero and reach back `steps` steps, 2/(steps + 1) of which
is the last one, and limit what one step can add: a hiccup of any length does not raise an alarm."""

import numpy as np

from steptron.config.detectors import DataStallConfig, StragglerConfig
from steptron.monitor.detect.alarm import Now, Surroundings
from steptron.monitor.detect.watcher import Finding, Reading, Watcher


class RankTimes(Watcher):
    """A share of time by rank, and seconds, both as running means; one alarm for all ranks."""

    kept = ("share_R", "seconds_R")

    def __init__(self, around: Surroundings, *, steps: int, clear_steps: int):
        super().__init__(cells=around.world_size, group=around.world_size, steps=1, clear_steps=clear_steps)
        self._weight = 2.0 / (steps + 1)
        self.share_R = np.zeros(around.world_size)
        self.seconds_R = np.zeros(around.world_size)

    def follow(self, share_R: np.ndarray, seconds_R: np.ndarray) -> None:
        """Move the running means."""
        self.share_R += self._weight * (share_R - self.share_R)
        self.seconds_R += self._weight * (seconds_R - self.seconds_R)


class Straggler(RankTimes):
    """See `StragglerConfig`. `share_R` is time ÷ median − 1."""

    name = "straggler"
    needs = ("step_time", "communication_time")

    def __init__(self, config: StragglerConfig, around: Surroundings):
        super().__init__(around, steps=config.steps, clear_steps=config.clear_steps)
        self._config = config

    def read(self, now: Now) -> Reading | None:
        by = self._config
        time_R = now.values("step_time") - now.values("communication_time")
        # The lower of the two middle ones: of two ranks the faster, which a slow one does not move.
        usual = float(np.sort(time_R)[(len(time_R) - 1) // 2]) if np.isfinite(time_R).all() else 0.0
        if usual <= 0.0 or len(time_R) < 2:
            return None
        excess_R = np.minimum(time_R / usual, by.cap) - 1.0
        self.follow(excess_R, excess_R * usual)

        def tell(rank: int) -> Finding:
            value = float(self.share_R[rank]) + 1.0
            return Finding(
                where={"rank": rank},
                value=value,
                threshold=by.ratio,
                unit="× median",
                text=f"rank {rank} takes {value:.3g} × the median rank's time, {self.seconds_R[rank]:.3g} s more a step; "
                f"the limit is {by.ratio:g}",
            )

        return Reading(
            bad=(self.share_R > by.ratio - 1.0) & (self.seconds_R > by.seconds),
            clean=(self.share_R < by.clear_ratio - 1.0) | (self.seconds_R < by.seconds / 2),
            severity=self.share_R,
            tell=tell,
        )


class DataStall(RankTimes):
    """See `DataStallConfig`. `share_R` is wait ÷ step time."""

    name = "data_stall"
    needs = ("step_time", "data_wait")

    def __init__(self, config: DataStallConfig, around: Surroundings):
        super().__init__(around, steps=config.steps, clear_steps=config.clear_steps)
        self._config = config

    def read(self, now: Now) -> Reading | None:
        by = self._config
        time_R, wait_R = now.values("step_time"), now.values("data_wait")
        if not (np.isfinite(time_R).all() and np.isfinite(wait_R).all() and (time_R > 0).all()):
            return None
        share_R = np.clip(wait_R / time_R, 0.0, 1.0)
        self.follow(share_R, np.minimum(wait_R, time_R))

        def tell(rank: int) -> Finding:
            value = float(self.share_R[rank])
            return Finding(
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
