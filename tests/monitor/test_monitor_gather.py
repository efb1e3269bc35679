"""Ranks' planes combined on rank 0, by the server, by SQL and by the dashboard, against the same done cell by cell."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from steptron.monitor.dashboard import plane_reader
from steptron.monitor.statistics.gather import Gather
from steptron.monitor.statistics.merge import Merged
from steptron.monitor.statistics.registry import Registry, table_name
from steptron.monitor.storage import store
from steptron.monitor.storage.files import Folder
from steptron.monitor.storage.store import Store

from planes import merged
from ranks import run_ranks

RANKS, STEPS = 3, 3
STATISTICS = {"loss", "peak", "square_sum", "count", "rms", "cosine", "high"}


def _registry(rank: int) -> Registry:
    """A vital front, cells of its own, cells that others have too, in another order; rank 2 has what rank 1 has."""
    layers, names = [((2, 5), ("b", "a")), ((5, 9), ("a", "c")), ((5, 9), ("a", "c"))][rank]
    registry = Registry()
    registry.add("loss", unit="nats", reduction="sum", axes={}, vital=True)
    registry.add("peak", unit="1", reduction="max", axes={"layer": layers, "expert": range(3)})
    registry.add("square_sum", unit="1", reduction="sum", axes={"parameter": names})
    registry.add("count", unit="1", reduction="sum", axes={"parameter": names})
    registry.derive("rms", unit="1", powers={"square_sum": 0.5, "count": -0.5})
    registry.derive("cosine", unit="1", powers={"count": 1, "square_sum": -1.5})
    registry.add("high", unit="1", reduction="max", axes={"layer": layers})
    return registry


def _plane(rank: int, step: int) -> torch.Tensor:
    registry = _registry(rank)
    values = np.random.default_rng((rank, step)).normal(0, 3, registry.slots).astype(np.float32)
    registry.view(values, "square_sum")[...] **= 2
    registry.view(values, "count")[...] = [0 if rank == 0 else rank + 1, 4]  # b: nothing to divide by
    if (rank, step) == (1, 2):
        registry.view(values, "count")[1] = np.nan  # of c, broken on one of two ranks
    registry.view(values, "loss")[...] = step  # summed already: the same on all ranks
    registry.view(values, "peak")[1, 0] = np.nan  # of layer 5, which others know, or 9: nothing known anywhere
    registry.view(values, "high")[0] = np.inf if (rank, step) == (0, 1) else -7.0 - rank
    return torch.from_numpy(values)


def _work(rank: int) -> tuple[dict, list[np.ndarray] | None]:
    whole = Gather(_registry(rank), torch.device("cpu"))
    parcels = [whole.send(_plane(rank, step)) for step in range(STEPS)]
    planes = [parcel.unpack() for parcel in parcels if parcel is not None]
    return whole.registry.to_dict(), planes if rank == 0 else None


Values = list[dict[str, dict[tuple, float]]]
"""Step → (statistic, plain or derived; cell) → value."""


def _expected() -> Values:
    steps = [
        merged([(_registry(rank).to_dict(), _plane(rank, step)) for rank in range(RANKS)]) for step in range(STEPS)
    ]
    return [found | {"loss": {(): float(step)}} for step, found in enumerate(steps)]


def _agree(found: Values, of: str, infinite: bool = True) -> None:
    for step, wanted in enumerate(_expected()):
        assert set(found[step]) == STATISTICS
        for name, cells in wanted.items():
            assert set(found[step][name]) == set(cells)
            values = np.array(list(cells.values()))
            values[np.isinf(values) & (not infinite)] = np.nan
            got = [found[step][name][cell] for cell in cells]
            np.testing.assert_allclose(got, values, rtol=1e-6, err_msg=f"{of}: {name}, step {step}")


def _by_cell(registry: Registry, plane: np.ndarray) -> dict[str, dict[tuple, float]]:
    found: dict[str, dict[tuple, float]] = {}
    for name in (*registry.statistics, *registry.derived):
        axes = [axis.values for axis in registry.grid_of(name)]
        found[name] = {
            tuple(axis[i] for axis, i in zip(axes, index, strict=True)): float(value)
            for index, value in np.ndenumerate(registry.values(plane, name))
        }
    return found


def test_rank_0_gets_every_cell_of_every_rank(tmp_path: Path) -> None:
    (layout, planes), *others = run_ranks(RANKS, _work, tmp_path)
    assert planes is not None
    assert len(planes) == STEPS
    assert all(other == (layout, None) for other in others)
    _agree([_by_cell(Registry.from_dict(layout), plane) for plane in planes], "rank 0")


def _stored() -> list[tuple[Registry, list[np.ndarray]]]:
    """Return the parts that ranks store or send: only rank 0's part begins with the vital statistics."""
    found = []
    for rank in range(RANKS):
        registry = _registry(rank)
        kept, start = (registry, 0) if rank == 0 else (registry.own(), registry.vital_slots)
        found.append((kept, [_plane(rank, step).numpy()[start:] for step in range(STEPS)]))
    return found


def _server(folder: Path) -> Values:
    members = _stored()
    combined = Merged({rank: registry for rank, (registry, _) in enumerate(members)})
    found: Values = []
    for step in range(STEPS):
        plane = np.empty(combined.registry.slots, np.float32)
        combined.reduce([(rank, planes[step]) for rank, (_, planes) in enumerate(members)], plane)
        found.append(_by_cell(combined.registry, plane))
    return found


def _write(folder: Path) -> Registry:
    for rank, (registry, planes) in enumerate(_stored()):
        part = Store(folder, f"rank-{rank:05d}", registry, STEPS)
        for step, plane in enumerate(planes):
            part.add(step, plane)
        part.close()
    return Merged({rank: registry for rank, (registry, _) in enumerate(_stored())}).registry


def _sql(folder: Path) -> Values:
    registry = _write(folder)
    found: Values = [{} for _ in range(STEPS)]
    with store.connect(folder) as connection:
        for name in (*registry.statistics, *registry.derived):
            grid = registry.grid_of(name)
            columns = ", ".join(["step", *(axis.name for axis in grid), name])
            known = {tuple(cell) for cell in np.ndindex(*(len(axis.values) for axis in grid))}
            cells = {tuple(axis.values[i] for axis, i in zip(grid, index, strict=True)) for index in known}
            for step in range(STEPS):
                found[step][name] = dict.fromkeys(cells, np.nan)
            for step, *cell, value in connection.execute(f"SELECT {columns} FROM {table_name(grid)}").fetchall():
                found[step][name][tuple(cell)] = np.nan if value is None else value
    return found


def _dashboard(folder: Path) -> Values:
    registry, place = _write(folder), Folder.at(folder)
    registries = [known for _, _, known in place.registries()]
    found: Values = [{} for _ in range(STEPS)]
    for table in {table_name(registry.grid_of(name)) for name in registry.statistics}:
        names = [
            name for name in (*registry.statistics, *registry.derived) if table_name(registry.grid_of(name)) == table
        ]
        axes = plane_reader._axes(registries, table)
        formulas, raw = plane_reader._ingredients(registries, names)
        view = plane_reader.View(table, axes, [(name, "1") for name in names], formulas, raw, 64, (None, None))  # pyright: ignore[reportArgumentType]
        steps, dense = plane_reader._dense(place, (0, 63), place.files(table=table), view)
        for step, values in zip(steps.tolist(), dense, strict=True):
            for name, column in zip(names, values, strict=True):
                found[step][name] = {
                    tuple(axis[i] for (_, axis), i in zip(axes, index, strict=True)): float(value)
                    for index, value in np.ndenumerate(column)
                }
    return found


@pytest.mark.parametrize("read", [_server, _sql, _dashboard], ids=["server", "sql", "dashboard"])
def test_every_reader_combines_the_ranks_alike(tmp_path: Path, read: Callable[[Path], Values]) -> None:
    """Nothing (NaN) does not change a maximum, a NaN in a sum stays, and nothing to divide by gives no value."""
    _agree(read(tmp_path), read.__name__, infinite=read is not _dashboard)  # pages have a gap for what is infinite
