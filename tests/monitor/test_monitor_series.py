"""Buckets of steps for the page, against loops in plain Python."""

import math
import random
from itertools import pairwise

import numpy as np
import pytest

from steptron.monitor import series

NAMES = ["base"] * 70 + ["long"] * 25 + ["anneal"] * 5


@pytest.mark.parametrize("limit", [1, 3, 10, 99, 100, 1000])
def test_buckets_cover_every_step_once_and_stay_in_their_stage(limit):
    borders = series.edges(NAMES, limit).tolist()
    assert borders[0] == 0
    assert borders[-1] == len(NAMES)
    assert borders == sorted(set(borders))
    assert len(borders) - 1 <= limit + 2
    for start, stop in pairwise(borders):
        assert len(set(NAMES[start:stop])) == 1


def test_summary_of_each_bucket():
    generator = random.Random(0)
    values = [generator.choice([generator.gauss(0, 1), math.nan, math.inf, -math.inf]) for _ in NAMES]
    borders = series.edges(NAMES, 40)
    mean, low, high = series.summarise(np.array(values), borders)
    for bucket, (start, stop) in enumerate(pairwise(borders)):
        inside = [value for value in values[start:stop] if math.isfinite(value)]
        if not inside:
            assert np.isnan([mean[bucket], low[bucket], high[bucket]]).all()
        else:
            assert mean[bucket] == pytest.approx(math.fsum(inside) / len(inside))
            assert (low[bucket], high[bucket]) == (min(inside), max(inside))


def test_missing_values_are_nan():
    rows = [{"loss": 1.5}, {}, {"loss": None}, {"loss": "text"}, {"loss": 2}]
    np.testing.assert_array_equal(series.column(rows, "loss"), [1.5, math.nan, math.nan, math.nan, 2.0])


def test_spans_of_equal_names():
    assert series.spans(NAMES) == [("base", 0, 70), ("long", 70, 95), ("anneal", 95, 100)]
    assert series.spans([]) == []
