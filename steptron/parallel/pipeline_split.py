"""Which layers are one pipeline stage, and which rank has which stages.

    costs of the layers ─ cut ─► consecutive layers a stage ─ schedule ─► stages a rank

Legend: L layers, S stages, P pipeline ranks.
"""

from collections.abc import Callable
from functools import cache

from steptron.config.schema import ModelConfig, PipelineConfig
from steptron.model.flops import costs_per_token
from steptron.model.transformer import Part


def num_stages(pipeline: PipelineConfig, pp: int) -> int:
    """Stages of the whole pipeline. Without pipeline ranks the section `pipeline` has no say."""
    if pp == 1:
        return 1
    return pp * {"1f1b": 1, "interleaved": pipeline.chunks, "zb-v": 2, "dualpipe-v": 2}[pipeline.schedule]


def ranks_of_stages(pipeline: PipelineConfig, pp: int) -> list[int]:
    """The pipeline rank of each stage: round and round (interleaved), or there and back (V)."""
    stages = num_stages(pipeline, pp)
    if pipeline.schedule in ("zb-v", "dualpipe-v"):
        return [min(stage, stages - 1 - stage) for stage in range(stages)]
    return [stage % pp for stage in range(stages)]


def cut(model: ModelConfig, pipeline: PipelineConfig, pp: int, seq_len: int) -> list[Part]:
    """The stages, in order. Cut where `pipeline.layers` says, else so that the dearest stage is as cheap as can be."""
    stages = num_stages(pipeline, pp)
    costs = costs_per_token(model, seq_len)
    lengths = pipeline.layers if stages > 1 and pipeline.layers else _even(costs.layers, costs.ends, stages)
    assert len(lengths) == stages, "parallel/rules.py has checked it"
    starts = [sum(lengths[:stage]) for stage in range(stages)]
    return [
        Part(start, start + length, first=stage == 0, last=stage == stages - 1)
        for stage, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]


def _even(costs_L: tuple[float, ...], end: float, stages: int) -> tuple[int, ...]:
    """Layers of each stage, at least one: the smallest possible cost of the dearest stage, and the others as even as that allows.

    `end` is added to the last stage. By dynamic programming, O(L² · S)."""
    # Where the ends alone make the last stage the dearest, its cost says nothing of the others: their squares do.
    dearest = _best(costs_L, end, stages, lambda cost, rest: max(cost, rest), float("inf"))[0]
    return _best(costs_L, end, stages, lambda cost, rest: cost * cost + rest, dearest * (1 + 1e-9))[1]


def _best(
    costs_L: tuple[float, ...], end: float, stages: int, join: Callable[[float, float], float], limit: float
) -> tuple[float, tuple[int, ...]]:
    """The smallest value of join(first stage, join(second stage, …)) with no stage dearer than `limit`, and the lengths for it."""

    @cache
    def best(start: int, left: int) -> tuple[float, tuple[int, ...]]:
        """Of the layers from `start` in `left` stages."""
        if left == 1:
            cost = sum(costs_L[start:]) + end
            return (join(cost, 0.0) if cost <= limit else float("inf")), (len(costs_L) - start,)
        found = (float("inf"), ())
        cost = 0.0
        for length in range(1, len(costs_L) - start - left + 2):
            cost += costs_L[start + length - 1]
            if cost > limit:
                break
            rest, lengths = best(start + length, left - 1)
            found = min(found, (join(cost, rest), (length, *lengths)))
        return found

    return best(0, stages)
