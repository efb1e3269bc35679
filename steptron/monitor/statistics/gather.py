"""The planes of all ranks, combined on rank 0 in each step, for sinks that need them at once (W&B).

Stores combine them when they are read.

    rank 0: peak[layer 0–5], loss sums ─┐  one sum, one maximum over all ranks
    rank 1: peak[layer 6–11], loss sums ─┴─────────────────────────────► rank 0: peak[layer 0–11], loss sums ─► host

The vital front is already summed and taken as it is.
"""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from steptron.monitor.statistics.host_copy import HostCopies, PendingCopy
from steptron.monitor.statistics.merge import Merged
from steptron.monitor.statistics.registry import Registry


class Gather:
    """The combination of all ranks' planes. Every rank has one; all ranks create it, and call `send`, together."""

    def __init__(self, registry: Registry, device: torch.device):
        """Prepare the combination. `registry`: the registry of this rank's planes, vital front included."""
        known = _of_all_ranks(registry)
        merged = Merged(dict(enumerate(known.values())))
        self.registry = merged.registry
        """The registry of the combined planes."""
        self._vital = registry.vital_slots
        places = merged.places(list(known).index(registry.identity))
        mine, every = _is_peak(registry), _is_peak(merged.registry)
        self._sums = _Cells(places, ~mine, ~every, self._vital, device)
        self._peaks = _Cells(places, mine, every, self._vital, device)
        slots = merged.registry.slots if dist.get_rank() == 0 else 0
        self._values = torch.empty(slots, device=device)
        self._outbox = HostCopies(slots, device) if slots else None

    def send(self, values: Tensor) -> PendingCopy | None:
        """Combine one step from each rank's plane, float32 [slots].

        Returns None on ranks other than the first, or if the step was dropped.
        """
        self._sums.reduce(values, 0.0, dist.ReduceOp.SUM)
        self._peaks.reduce(values, -torch.inf, dist.ReduceOp.MAX)
        if self._outbox is None:
            return None
        self._values[: self._vital] = values[: self._vital]
        self._sums.put(self._values)
        self._peaks.put(self._values)
        return self._outbox.send(self._values)


class _Cells:
    """The cells of one reduction: their positions in this rank's plane and in the merged plane.

    `_totals` has one value per cell of all ranks.
    """

    def __init__(self, places: np.ndarray, mine: np.ndarray, every: np.ndarray, vital: int, device: torch.device):
        mine, every = mine & (np.arange(len(mine)) >= vital), every & (np.arange(len(every)) >= vital)
        position = np.cumsum(every) - 1
        self._from = torch.from_numpy(np.flatnonzero(mine)).to(device)
        self._to = torch.from_numpy(position[places[mine]]).to(device)
        self._place = torch.from_numpy(np.flatnonzero(every)).to(device)
        self._totals = torch.empty(len(self._place), device=device)

    def reduce(self, values: Tensor, empty: float, how: dist.ReduceOp.RedOpType) -> None:
        """Reduce the cells over all ranks, to the first.

        `empty` stands for a cell that a rank does not have or know (NaN for a maximum).
        """
        self._totals.fill_(empty)
        own = values[self._from]
        if how == dist.ReduceOp.MAX:
            own = own.nan_to_num(nan=empty, posinf=torch.inf, neginf=empty)
        self._totals[self._to] = own
        dist.reduce(self._totals, 0, how)

    def put(self, values: Tensor) -> None:
        """Write the result to the merged plane, where a maximum without values becomes NaN again."""
        values[self._place] = torch.where(self._totals == -torch.inf, torch.nan, self._totals)


def _of_all_ranks(registry: Registry) -> dict[str, Registry]:
    """Return the registries of all ranks by identity; ranks are many, but different registries few."""
    identities: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(identities, registry.identity)
    speaks = identities.index(registry.identity) == dist.get_rank()
    told: list[dict | None] = [None] * len(identities)
    dist.all_gather_object(told, registry.to_dict() if speaks else None)
    return {one: Registry.from_dict(layout) for one, layout in zip(identities, told, strict=True) if layout is not None}


def _is_peak(registry: Registry) -> np.ndarray:
    """Return which slots hold maxima, bool [slots]. The others are sums."""
    peaks = np.zeros(registry.slots, dtype=bool)
    for name, statistic in registry.statistics.items():
        assert statistic.reduction in ("sum", "max"), f"{name!r} is a {statistic.reduction}"
        registry.view(peaks, name)[...] = statistic.reduction == "max"
    return peaks
