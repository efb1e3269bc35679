"""Buckets of steps for the page, against loops in plain Python."""

import math
import random
from itertools import pairwise

import numpy as np
import pytest
from steptron.monitor.statistics import downsample

NAMES = ["base"] * 70 + ["long"] * 25 + ["anneal"] * 5


@pytest.mark.parametrize("limit", [1, 3, 10, 99, 100, 1000])
def test_buckets_cover_every_step_once_and_stay_in_their_stage(limit):
    borders = downsample.edges(NAMES, limit).tolist()
    assert borders[0] == 0
    assert borders[-1] == len(NAMES)
    assert borders == sorted(set(borders))
    assert len(borders) - 1 <= limit + 2
    for start, stop in pairwise(borders):
        assert len(set(NAMES[start:stop])) == 1


def test_summary_of_each_bucket():
    generator = random.Random(0)
    values = [generator.choice([generator.gauss(0, 1), math.nan, math.inf, -math.inf]) for _ in NAMES]
    borders = downsample.edges(NAMES, 40)
    mean, low, high = downsample.summarise(np.array(values), borders)
    for bucket, (start, stop) in enumerate(pairwise(borders)):
        inside = [value for value in values[start:stop] if math.isfinite(value)]
        if not inside:
            assert np.isnan([mean[bucket], low[bucket], high[bucket]]).all()
        else:
            assert mean[bucket] == pytest.approx(math.fsum(inside) / len(inside))
            assert (low[bucket], high[bucket]) == (min(inside), max(inside))


def test_spans_of_equal_names():
    assert downsample.spans(NAMES) == [("base", 0, 70), ("long", 70, 95), ("anneal", 95, 100)]
    assert downsample.spans([]) == []


def test_spans_are_the_same_in_whatever_order_steps_come():
    """Against loops in plain Python: sums, maxima and minima of what is known, a power of two of steps in each, none in
    two stages."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=(100, 3))
    values[generator.random(values.shape) < 0.2] = np.nan
    stages = np.array([["base", "long", "anneal"].index(name) for name in NAMES])
    found = []
    for order in (range(20), generator.permutation(20)):
        spans = downsample.Spans(8)
        for block in order:
            steps = np.arange(5 * block, 5 * block + 5)
            rows = {kind: (kind, values[steps]) for kind in ("sum", "max", "min")}
            spans.add(steps, stages[steps], rows)
        found.append(spans.in_order())
    assert len(found[0]) <= 2 * 8 + 3
    for (stage, one), (_, other) in zip(*found, strict=True):
        assert (one.first, one.last) == (other.first, other.last)
        assert one.first // spans.stride == one.last // spans.stride
        assert set(stages[one.first : one.last + 1]) == {stage}
        for kind, fold in (("sum", math.fsum), ("max", max), ("min", min)):
            for column in range(3):
                known = [value for value in values[one.first : one.last + 1, column] if not math.isnan(value)]
                expected = fold(known) if known or kind == "sum" else math.nan
                np.testing.assert_allclose(one.values[kind][1][column], expected, atol=1e-12)
                np.testing.assert_allclose(other.values[kind][1][column], expected, atol=1e-12)
    assert sum(one.last + 1 - one.first for _, one in found[0]) == 100
