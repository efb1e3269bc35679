"""Ranks' planes put together on rank 0 in each step, against the same done cell by cell."""

import numpy as np
import torch
from planes import merged
from ranks import run_ranks

from steptron.monitor.statistics.gather import Gather
from steptron.monitor.statistics.registry import Registry

RANKS, STEPS = 3, 3


def _registry(rank: int) -> Registry:
    """A vital front, cells of its own, cells that others have too, in another order; rank 2 has what rank 1 has."""
    layers, names = [((2, 5), ("b", "a")), ((5, 9), ("a", "c")), ((5, 9), ("a", "c"))][rank]
    registry = Registry()
    registry.add("loss", unit="nats", reduction="sum", axes={}, vital=True)
    registry.add("peak", unit="1", reduction="max", axes={"layer": layers, "expert": range(3)})
    registry.add("square_sum", unit="1", reduction="sum", axes={"parameter": names})
    registry.derive("norm", unit="1", powers={"square_sum": 0.5})
    registry.add("high", unit="1", reduction="max", axes={"layer": layers})
    return registry


def _plane(rank: int, step: int) -> torch.Tensor:
    registry = _registry(rank)
    values = np.random.default_rng((rank, step)).normal(0, 3, registry.slots).astype(np.float32)
    registry.view(values, "square_sum")[...] **= 2
    registry.view(values, "loss")[...] = step  # summed already: the same on all ranks
    registry.view(values, "peak")[1, 0] = np.nan  # of layer 5 or 9: nothing known, here or anywhere
    registry.view(values, "high")[0] = np.inf if (rank, step) == (0, 1) else -7.0 - rank
    return torch.from_numpy(values)


def _work(rank: int) -> tuple[dict, list[np.ndarray] | None]:
    whole = Gather(_registry(rank), torch.device("cpu"))
    parcels = [whole.send(_plane(rank, step)) for step in range(STEPS)]
    planes = [parcel.unpack() for parcel in parcels if parcel is not None]
    return whole.registry.to_dict(), planes if rank == 0 else None


def test_rank_0_gets_every_cell_of_every_rank(tmp_path):
    (layout, planes), *others = run_ranks(RANKS, _work, tmp_path)
    assert planes is not None
    assert len(planes) == STEPS
    assert all(other == (layout, None) for other in others)
    for step, plane in enumerate(planes):
        wanted = merged([(_registry(rank).to_dict(), _plane(rank, step)) for rank in range(RANKS)])
        wanted["loss"] = {(): float(step)}
        got = merged([(layout, torch.from_numpy(plane))])
        assert set(got) == {"loss", "peak", "square_sum", "norm", "high"}
        for name, cells in wanted.items():
            assert set(got[name]) == set(cells)
            np.testing.assert_allclose(
                [got[name][cell] for cell in cells], list(cells.values()), rtol=1e-6, err_msg=f"{name}, step {step}"
            )
