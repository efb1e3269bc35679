"""The split of the layers into pipeline stages, and the assignment of stages to ranks.

    costs of the layers ─ cut ─► consecutive layers of each stage ─ schedule ─► stages of each rank

Legend: L layers, S stages, P pipeline ranks.
"""

from collections.abc import Callable
from functools import cache

from steptron.config.schema import ModelConfig, PipelineConfig
from steptron.model.flops import costs_per_token
from steptron.model.transformer import Part


def num_stages(pipeline: PipelineConfig, pp: int) -> int:
    """Return the number of stages of the pipeline; 1 without pipeline ranks, whatever the section `pipeline` says."""
    if pp == 1:
        return 1
    return pp * {"1f1b": 1, "interleaved": pipeline.chunks, "zb-v": 2, "dualpipe-v": 2}[pipeline.schedule]


def ranks_of_stages(pipeline: PipelineConfig, pp: int) -> list[int]:
    """Return the pipeline rank of each stage: in rounds (interleaved), or forth and back (V-shaped schedules)."""
    stages = num_stages(pipeline, pp)
    if pipeline.schedule in ("zb-v", "dualpipe-v"):
        return [min(stage, stages - 1 - stage) for stage in range(stages)]
    return [stage % pp for stage in range(stages)]


def cut(model: ModelConfig, pipeline: PipelineConfig, pp: int, seq_len: int) -> list[Part]:
    """Return the stages in order.

    `pipeline.layers` gives the layers of each stage; if it is empty, the most expensive stage is made as cheap as
    possible.
    """
    stages = num_stages(pipeline, pp)
    costs = costs_per_token(model, seq_len)
    lengths = pipeline.layers if stages > 1 and pipeline.layers else _even(costs.layers, costs.ends, stages)
    assert len(lengths) == stages, "parallel/rules.py has checked the number of entries"
    starts = [sum(lengths[:stage]) for stage in range(stages)]
    return [
        Part(start, start + length, first=stage == 0, last=stage == stages - 1)
        for stage, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]


def _even(costs_L: tuple[float, ...], end: float, stages: int) -> tuple[int, ...]:
    """Return the number of layers of each stage, at least one.

    The most expensive stage is as cheap as possible, and the others are as even as that allows. `end` is added to the
    last stage. Computed by dynamic programming in O(L² · S).
    """
    # If `end` alone makes the last stage the most expensive, the maximum says nothing about the other stages; the sum
    # of squares does.
    dearest = _best(costs_L, end, stages, lambda cost, rest: max(cost, rest), float("inf"))[0]
    return _best(costs_L, end, stages, lambda cost, rest: cost * cost + rest, dearest * (1 + 1e-9))[1]


def _best(
    costs_L: tuple[float, ...], end: float, stages: int, join: Callable[[float, float], float], limit: float
) -> tuple[float, tuple[int, ...]]:
    """Return the smallest value of join(first stage, join(second stage, …)), and the lengths of its stages.

    No stage may cost more than `limit`.
    """

    @cache
    def best(start: int, left: int) -> tuple[float, tuple[int, ...]]:
        """Return the best split of the layers from `start` on into `left` stages."""
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
