"""The plane as the page gets it: written by ranks, read back, decoded as the page's script does, against sums in plain
NumPy."""

import base64

import numpy as np
import pytest
from steptron.monitor.dashboard import heatmap, plane_reader
from steptron.monitor.dashboard.plane_reader import PlaneReader
from steptron.monitor.statistics import downsample
from steptron.monitor.statistics.registry import Registry
from steptron.monitor.storage import store
from steptron.monitor.storage.store import Store

LAYERS, EXPERTS = (2, 3, 5), 6
STAGES, STARTS = ["base", "long"], [1, 25]


@pytest.fixture(autouse=True)
def short_windows(monkeypatch):
    """Have several windows in a run of a few steps."""
    monkeypatch.setattr(plane_reader, "WINDOW_STEPS", 8)
    monkeypatch.setattr(plane_reader, "WINDOW_ROWS", 1)


def _registry(parameters=("a", "b"), layers=LAYERS) -> Registry:
    registry = Registry()
    by_expert = {"layer": layers, "expert": range(EXPERTS)}
    for name in ("tokens", "rows", "out_norm_sum"):
        registry.add(name, unit="tokens", reduction="sum", axes=by_expert)
    registry.derive("out_norm", unit="1", powers={"out_norm_sum": 1, "rows": -1})
    registry.add("peak", unit="1", reduction="max", axes=by_expert)
    registry.add("square_sum", unit="1", reduction="sum", axes={"parameter": parameters})
    registry.derive("norm", unit="1", powers={"square_sum": 0.5})
    return registry


def _planes(registry: Registry, steps: int = 40, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    planes_SP = random.uniform(1, 50, (steps, registry.slots)).astype(np.float32)
    for plane in planes_SP:
        registry.view(plane, "tokens")[1, 4] = 0
    return planes_SP


def _write(folder, registry: Registry, planes_SP: np.ndarray, part: str = "rank-00000", flush_every: int = 7) -> None:
    written = Store(folder, part, registry, flush_every)
    for step, plane in enumerate(planes_SP, 1):
        written.add(step, plane)
    written.close()


def _watch(folder, **options) -> PlaneReader:
    watched = PlaneReader(str(folder))
    while watched.poll(STARTS, **options):
        pass
    return watched


def _ratios(text: str) -> np.ndarray:
    codes = np.frombuffer(base64.b64decode(text), "<u2").astype(np.float64)
    ratios = np.where(codes == 0, 0.0, 2 ** ((codes - 1) / 65533 * 24 - 12))
    return np.where(codes == 65535, np.nan, ratios)


def _floats(text: str, *shape: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4").reshape(shape)


@pytest.mark.parametrize("slices", [120, 20, 2], ids=["a slice a step", "several steps a slice", "few slices"])
def test_cells_are_means_over_steps_relative_to_their_row(tmp_path, monkeypatch, slices):
    registry = _registry()
    planes_SP = _planes(registry)
    _write(tmp_path, registry, planes_SP)
    monkeypatch.setattr(plane_reader, "MAX_SLICES", slices)
    view = _watch(tmp_path).views["layer_expert"]
    seen = 0
    for column, centre in (("tokens", np.mean), ("out_norm", np.median), ("peak", np.median)):
        found = heatmap.cells(view, column, STAGES)
        shape = (len(found["slices"]), len(LAYERS), EXPERTS)
        assert (found["rows"], len(found["slices"]) <= slices + 2) == (list(LAYERS), True)
        for (first, last, stage), ratio_LE, centre_L in zip(
            found["slices"], _ratios(found["ratio"]).reshape(shape), _floats(found["centre"], *shape[:2]), strict=True
        ):
            assert stage == ("base" if last < 25 else "long")
            assert (first < 25) == (last < 25), "no slice is in two stages"
            values_LE = np.mean([registry.values(plane, column) for plane in planes_SP[first - 1 : last]], axis=0)
            np.testing.assert_allclose(centre_L, centre(values_LE, axis=1), rtol=1e-5)
            np.testing.assert_allclose(ratio_LE, values_LE / centre(values_LE, axis=1)[:, None], rtol=3e-4)
            seen += last + 1 - first
    assert seen == 3 * 40, "every step is in one slice"


def test_extremes_keep_the_worst_step_of_a_span(tmp_path, monkeypatch):
    registry = _registry()
    planes_SP = _planes(registry)
    registry.view(planes_SP[17], "out_norm_sum")[2, 5] = 1e6
    _write(tmp_path, registry, planes_SP)
    monkeypatch.setattr(plane_reader, "MAX_SPANS", 8)
    found = heatmap.edges(_watch(tmp_path).views["layer_expert"], STAGES)
    shape = (len(found["columns"]), len(found["spans"]), len(LAYERS))
    assert shape[1] < 15
    position = [name for name, _ in found["columns"]].index("out_norm")
    every_SLE = np.stack([registry.values(plane, "out_norm") for plane in planes_SP])
    middle_SL = np.median(every_SLE, axis=-1)
    for span, high_L, low_L in zip(
        found["spans"], _floats(found["high"], *shape)[position], _floats(found["low"], *shape)[position], strict=True
    ):
        steps = slice(span[0] - 1, span[1])
        np.testing.assert_allclose(high_L, (every_SLE.max(axis=-1) / middle_SL)[steps].max(axis=0), rtol=1e-5)
        np.testing.assert_allclose(low_L, (every_SLE.min(axis=-1) / middle_SL)[steps].min(axis=0), rtol=1e-5)


def test_parts_of_several_ranks_add_up_as_sql_does(tmp_path):
    """Two ranks hold parts of the same cells and different parameters; the second comes late, to windows that were read
    already."""
    one, two = _registry(("a", "b")), _registry(("b", "c"), layers=(3, 5, 9))
    _write(tmp_path, one, _planes(one, 20))
    watched = PlaneReader(str(tmp_path))
    watched.poll([1])
    _write(tmp_path, two, _planes(two, 20, seed=1), "rank-00001")
    while watched.poll([1]):
        pass
    sql = store.connect(tmp_path)
    found = heatmap.named(watched.views["parameter"], ["base"])
    assert found["names"] == ["a", "b", "c"]
    values_SN = _floats(found["values"], 1, len(found["spans"]), 3)[0]
    for (step, _, _), row in zip(found["spans"], values_SN, strict=True):
        expected = dict(sql.execute("SELECT parameter, norm FROM parameter WHERE step = ?", [step]).fetchall())
        np.testing.assert_allclose(row, [expected["a"], expected["b"], expected["c"]], rtol=1e-5)
    cells = heatmap.cells(watched.views["layer_expert"], "out_norm", ["base"])
    assert cells["rows"] == [2, 3, 5, 9]
    centre_SL = _floats(cells["centre"], len(cells["slices"]), 4)
    query = "SELECT step, layer, median(out_norm) FROM layer_expert GROUP BY ALL ORDER BY ALL"
    expected = np.array([row[2] for row in sql.execute(query).fetchall()]).reshape(-1, 4)
    np.testing.assert_allclose(centre_SL, expected, rtol=1e-5)


@pytest.mark.parametrize("live", [True, False], ids=["while it grows", "at the end"])
def test_parts_cut_at_different_steps_are_put_together_as_sql_does(tmp_path, live):
    """Two servers share parameters and cells, and write files of different lengths; a step of one comes late, in a file
    of its own."""
    cuts = {"server-00": (37, 80, 119, 160), "server-01": (41, 80, 125, 160)}
    registry = _registry()
    stores = {part: Store(tmp_path, part, registry, 1000) for part in cuts}
    planes_SP = {part: _planes(registry, 160, seed) for seed, part in enumerate(cuts)}
    watched = PlaneReader(str(tmp_path))
    for step in range(1, 161):
        for part, written in stores.items():
            if (part, step) != ("server-01", 50):
                written.add(step, planes_SP[part][step - 1])
            if step in cuts[part]:
                written.flush()
                if (part, step) == ("server-01", 80):
                    written.add(50, planes_SP[part][49])
                    written.flush()
                while live and watched.poll([1]):
                    pass
    while watched.poll([1]):
        pass
    found = heatmap.named(watched.views["parameter"], ["base"])
    values_SN = _floats(found["values"], 1, len(found["spans"]), 2)[0]
    sql = store.connect(tmp_path)
    for (first, last, _), row in zip(found["spans"], values_SN, strict=True):
        query = "SELECT avg(norm) FROM parameter WHERE step BETWEEN ? AND ? GROUP BY parameter ORDER BY parameter"
        np.testing.assert_allclose(row, np.ravel(sql.execute(query, [first, last]).fetchall()), rtol=1e-5)
    assert sum(last + 1 - first for first, last, _ in found["spans"]) == 160, "each step is in one span"


def test_what_a_rank_adds_late_to_the_newest_steps_is_seen(tmp_path):
    registry = _registry()
    planes_SP = _planes(registry, 8)
    ranks = [Store(tmp_path, f"rank-{rank:05d}", registry, 4) for rank in range(2)]
    watched = PlaneReader(str(tmp_path))
    for start in (0, 4):
        for written in ranks:
            for step in range(start, start + 4):
                written.add(step + 1, planes_SP[step])
            while watched.poll([1]):
                pass
    found = heatmap.named(watched.views["parameter"], ["base"])
    values_SN = _floats(found["values"], 1, len(found["spans"]), 2)[0]
    expected = np.sqrt(2 * np.stack([registry.view(plane, "square_sum") for plane in planes_SP]))
    np.testing.assert_allclose(values_SN, expected, rtol=1e-5)
    assert watched.generation == 2, "and only a rank's first file, with its registry, is a reason to read all anew"


def test_a_long_run_is_read_coarsely_first_and_not_whole(tmp_path, monkeypatch):
    registry = _registry()
    _write(tmp_path, registry, _planes(registry), flush_every=1)
    monkeypatch.setattr(plane_reader, "MAX_WINDOWS", 10)
    monkeypatch.setattr(plane_reader, "WINDOW_STEPS", 1)
    read: list[int] = []
    real = plane_reader._dense
    monkeypatch.setattr(plane_reader, "_dense", lambda *args: (read.append(args[1][0]), real(*args))[1])
    _watch(tmp_path, budget_s=0.0)
    order = list(dict.fromkeys(read))
    assert (set(order[:2]), order[2], order[3]) == ({39, 40}, 1, 33), "the newest, then the run in halves"
    assert len(order) <= 10 + plane_reader.FRESH
    assert max(np.diff(sorted(order))) <= 7


def test_what_a_rewind_cuts_is_forgotten(tmp_path):
    registry = _registry()
    planes_SP = _planes(registry)
    _write(tmp_path, registry, planes_SP)
    watched = _watch(tmp_path)
    written = Store(tmp_path, "rank-00000", registry, 7)
    written.truncate_after(16)
    written.close()
    while watched.poll(STARTS):
        pass
    slices = heatmap.cells(watched.views["layer_expert"], "tokens", STAGES)["slices"]
    assert max(last for _, last, _ in slices) == 16


def test_a_file_that_cannot_be_read_is_left_out(tmp_path, caplog):
    registry = _registry()
    _write(tmp_path, registry, _planes(registry))
    first = min((tmp_path / "layer_expert").glob("*.parquet"))
    first.write_bytes(first.read_bytes()[:100])
    slices = heatmap.cells(_watch(tmp_path).views["layer_expert"], "tokens", STAGES)["slices"]
    assert (slices[0][0], slices[-1][1]) == (8, 40)
    assert "cannot be read" in caplog.text


def test_no_plane_no_views(tmp_path):
    watched = _watch(tmp_path / "none")
    assert watched.views == {}


def test_codes_keep_zero_nearly_zero_and_unknown_apart():
    found = _ratios(heatmap.encode(np.array([[[0.0, 1e-9, 1.0, 3.0, np.nan]]]), np.array([[1.0]])))
    np.testing.assert_allclose(found, [0, 2**-12, 1, 3, np.nan], rtol=3e-4)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 6])
def test_median_of_what_is_known(count):
    values = np.array([*np.random.default_rng(count).permutation(count).astype(float), *[np.nan] * (6 - count)])
    expected = np.median(values[:count]) if count else np.nan
    np.testing.assert_equal(downsample.median(values[None])[0], expected)
