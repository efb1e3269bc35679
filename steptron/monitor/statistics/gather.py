"""The planes of all ranks, combined on rank 0 in each step, for sinks that need them at once (W&B).

Stores combine them when they are read.

    rank 0: peak[layer 0–5], loss sums ─┐  one sum, one maximum over all ranks
    rank 1: peak[layer 6–11], loss sums ─┴─────────────────────────────► rank 0: peak[layer 0–11], loss sums ─► host

The vital front is already summed and taken as it is.
"""

import math

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from steptron.monitor.statistics.host_copy import HostCopies, PendingCopy
from steptron.monitor.statistics.merge import Merged
from steptron.monitor.statistics.reduction import RULES, Reduction, Rule
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
        self._cells = [
            _Cells(places, rule, _has(registry, name), _has(merged.registry, name), self._vital, device)
            for name, rule in RULES.items()
        ]
        slots = merged.registry.slots if dist.get_rank() == 0 else 0
        self._values = torch.empty(slots, dtype=torch.float32, device=device)
        self._outbox = HostCopies(slots, device) if slots else None

    def send(self, values: Tensor) -> PendingCopy | None:
        """Combine one step from each rank's plane, float32 [slots].

        Returns None on ranks other than the first, or if the step was dropped.
        """
        for cells in self._cells:
            cells.reduce(values)
        if self._outbox is None:
            return None
        self._values[: self._vital] = values[: self._vital]
        for cells in self._cells:
            cells.put(self._values)
        return self._outbox.send(self._values)


class _Cells:
    """The cells of one reduction: their positions in this rank's plane and in the merged plane.

    `_totals` has one value per cell of all ranks.
    """

    def __init__(
        self,
        places: np.ndarray,
        rule: Rule,
        mine: np.ndarray,
        every: np.ndarray,
        vital: int,
        device: torch.device,
    ):
        self._rule = rule
        mine, every = mine & (np.arange(len(mine)) >= vital), every & (np.arange(len(every)) >= vital)
        position = np.cumsum(every) - 1
        self._from = torch.from_numpy(np.flatnonzero(mine)).to(device)
        self._to = torch.from_numpy(position[places[mine]]).to(device)
        self._place = torch.from_numpy(np.flatnonzero(every)).to(device)
        self._totals = torch.empty(len(self._place), dtype=torch.float32, device=device)

    def reduce(self, values: Tensor) -> None:
        """Reduce the cells over all ranks, to the first. A rank without a value in a cell does not change it."""
        self._totals.fill_(self._rule.neutral)
        own = values[self._from]
        if math.isnan(self._rule.nothing):
            own = own.nan_to_num(nan=self._rule.neutral, posinf=torch.inf, neginf=-torch.inf)
        self._totals[self._to] = own
        dist.reduce(self._totals, 0, getattr(dist.ReduceOp, self._rule.collective))

    def put(self, values: Tensor) -> None:
        """Write the result to the merged plane, where a maximum without values becomes NaN again."""
        values[self._place] = torch.where(self._totals == self._rule.neutral, self._rule.nothing, self._totals)


def _of_all_ranks(registry: Registry) -> dict[str, Registry]:
    """Return the registries of all ranks by identity; ranks are many, but different registries few."""
    identities: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(identities, registry.identity)
    speaks = identities.index(registry.identity) == dist.get_rank()
    told: list[dict | None] = [None] * len(identities)
    dist.all_gather_object(told, registry.to_dict() if speaks else None)
    return {one: Registry.from_dict(layout) for one, layout in zip(identities, told, strict=True) if layout is not None}


def _has(registry: Registry, reduction: Reduction) -> np.ndarray:
    """Return which slots are reduced in that way, bool [slots]."""
    found = np.zeros(registry.slots, dtype=bool)
    for name, statistic in registry.statistics.items():
        registry.view(found, name)[...] = statistic.reduction == reduction
    return found
