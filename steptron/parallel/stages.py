"""Which layers are one pipeline stage, and which rank has which stages.

    costs of the layers ─ cut ─► consecutive layers a stage ─ schedule ─► stages a rank

Legend: L layers, S stages, P pipeline ranks.
"""

from functools import cache

from steptron.config.schema import ModelConfig, PipelineConfig
from steptron.model.flops import costs_per_token
from steptron.model.transformer import Part


def num_stages(pipeline: PipelineConfig, pp: int) -> int:
    """Stages of the whole pipeline."""
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
    assert len(lengths) == stages and sum(lengths) == model.num_layers, "parallel/rules.py has checked it"
    starts = [sum(lengths[:stage]) for stage in range(stages)]
    return [
        Part(start, start + length, first=stage == 0, last=stage == stages - 1)
        for stage, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]


def _even(costs_L: tuple[float, ...], end: float, stages: int) -> tuple[int, ...]:
    """Layers of each stage, at least one, with the smallest possible cost of the dearest stage; `end` is added to the last one.

    By dynamic programming, O(L² · S)."""

    @cache
    def best(start: int, left: int) -> tuple[float, tuple[int, ...]]:
        """Dearest stage of layers from `start` in `left` stages, and their lengths."""
        if left == 1:
            return sum(costs_L[start:]) + end, (len(costs_L) - start,)
        found = (float("inf"), ())
        cost = 0.0
        for length in range(1, len(costs_L) - start - left + 2):
            cost += costs_L[start + length - 1]
            rest, lengths = best(start + length, left - 1)
            found = min(found, (max(cost, rest), (length, *lengths)))
        return found

    return best(0, stages)[1]
