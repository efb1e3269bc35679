"""metrics.jsonl as the page's columns, while it grows, is cut and grows again."""

import json
import math

import numpy as np
from steptron.monitor.sinks.metrics_jsonl import JsonlSink
from steptron.monitor.statistics.frame import Frame
from steptron.monitor.storage.metrics_table import MetricsTable


def _write(sink: JsonlSink, steps, loss: float) -> None:
    for step in steps:
        more = {"late": 1.5} if step % 3 == 0 else {}
        metrics = {"step": step, "stage": "base", "loss": loss + step, "resumed": True, **more}
        sink.write(Frame(step=step, metrics=metrics, tokens_by_source={"prose": step}, plane=None))


def _expected(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_columns_are_the_files_lines_also_where_keys_come_and_go(tmp_path):
    sink, rows = JsonlSink(tmp_path), MetricsTable(tmp_path / "metrics.jsonl")
    rows.poll()
    for steps in (range(1, 4), range(4, 8), range(8, 9)):
        _write(sink, steps, 0.5)
        rows.poll()
        lines = _expected(tmp_path / "metrics.jsonl")
        assert list(rows.steps) == [line["step"] for line in lines]
        for key in ("loss", "late", "resumed", "nothing"):
            values = [line.get(key, math.nan) if key != "resumed" else math.nan for line in lines]
            np.testing.assert_array_equal(rows.column(key), values)
            last = values[-1]
            assert rows.value(key, -1) == (last if math.isfinite(last) else None)
        assert rows.sources(0, len(lines)) == {"prose": sum(line["step"] for line in lines)}
    assert rows.value("loss", 99) is None
    sink.close()


def test_a_file_that_was_cut_and_has_grown_beyond_is_read_anew(tmp_path):
    """A look in between may have missed it: neither the file nor its length tell."""
    sink, rows = JsonlSink(tmp_path), MetricsTable(tmp_path / "metrics.jsonl")
    _write(sink, range(1, 21), 0.5)
    rows.poll()
    for back, again in ((10, 30), (29, 30), (0, 40)):
        sink.truncate_after(back)
        _write(sink, range(back + 1, again + 1), 1000.0 + back)
        rows.poll()
        lines = _expected(tmp_path / "metrics.jsonl")
        assert list(rows.steps) == list(range(1, again + 1))
        np.testing.assert_array_equal(rows.column("loss"), [line["loss"] for line in lines])
    sink.close()
