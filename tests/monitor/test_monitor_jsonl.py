"""metrics.jsonl: what goes in comes out, and a resumed run finds just its past."""

import json
import math

import numpy as np
import pytest
from fake_run import make_recipe, make_steps

from steptron.monitor.frame import Frame
from steptron.monitor.sinks.jsonl import JsonlSink


def _frame(step: int, **metrics) -> Frame:
    values = {"step": step, "stage": "base", **metrics}
    return Frame(step=step, metrics=values, tokens_by_source={"prose": 3}, plane=None)


def test_a_line_a_step_at_full_precision(tmp_path):
    rows = [metrics for metrics, _, _ in make_steps(make_recipe(tmp_path, 20))]
    sink = JsonlSink(tmp_path)
    for metrics in rows:
        sink.write(Frame(step=metrics["step"], metrics=metrics, tokens_by_source={"code": 7}, plane=None))
    # Not closed: every line is there as soon as it is written.
    read = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert read == [{**metrics, "tokens_by_source": {"code": 7}} for metrics in rows]
    sink.close()


def test_keys_keep_their_order(tmp_path):
    sink = JsonlSink(tmp_path)
    sink.write(_frame(1, tokens=5, loss=np.float64(0.1), mfu=None))
    sink.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert list(json.loads(line)) == ["step", "stage", "tokens", "loss", "mfu", "tokens_by_source"]


def test_a_loss_that_is_not_finite_is_kept(tmp_path):
    sink = JsonlSink(tmp_path)
    sink.write(_frame(1, loss=math.nan, grad_norm=math.inf))
    sink.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert math.isnan(row["loss"])
    assert row["grad_norm"] == math.inf


@pytest.mark.parametrize(
    "tail", ["", '{"step": 8, "loss": 1.', '{"step": 99, "loss": 1.5}'], ids=["whole", "torn", "no newline"]
)
@pytest.mark.parametrize("keep", [0, 3, 7, 9])
def test_truncation_keeps_earlier_lines_byte_for_byte(tmp_path, keep, tail):
    sink = JsonlSink(tmp_path)
    for step in range(1, 8):
        sink.write(_frame(step, loss=1 / step))
    sink.close()
    path = tmp_path / "metrics.jsonl"
    before = path.read_text().splitlines(keepends=True)
    path.write_text("".join(before) + tail)
    sink = JsonlSink(tmp_path)
    sink.truncate_after(keep)
    sink.write(_frame(keep + 1, loss=0.25))
    sink.close()
    after = path.read_text().splitlines(keepends=True)
    assert after[:-1] == before[:keep]
    assert json.loads(after[-1])["step"] == keep + 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]
