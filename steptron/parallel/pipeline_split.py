"""The split of the network into pipeline stages, and the assignment of stages to ranks.

    costs of the units ─ cut ─► consecutive units of each stage ─ schedule ─► stages of each rank

The units are those of `model/parts.py`: the embedding, halves of layers, output matrices, blocks of MTP heads.

Legend: U units, S stages, P pipeline ranks.
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate

from steptron.config.schema import ModelConfig, PipelineConfig, Recipe, StageConfig, trained_heads
from steptron.model.flops import unit_costs
from steptron.model.parts import Part, parts_of, units_of


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


def cut(recipe: Recipe, pp: int) -> list[Part]:
    """Return the stages of the pipeline in order. All stages of the curriculum have the same.

    The most expensive rank is made as cheap as possible in the longest stage of the curriculum. `pipeline.layers` gives
    the layers of each stage; then only the units behind the layers are cut by cost.
    """
    model, pipeline = recipe.model, recipe.parallel.pipeline
    costs_U = _costs(recipe)
    if pp > 1 and pipeline.layers:
        return parts_of(model, _written(model, pipeline.layers, costs_U))
    return parts_of(model, even_cut(costs_U, ranks_of_stages(pipeline, pp)))


def even_cut(costs_U: tuple[float, ...], owners: Sequence[int]) -> tuple[int, ...]:
    """Return the number of units of each stage that spreads these costs evenly over the ranks; `owners`: by stage."""
    one_a_rank = len(owners) == len(set(owners))
    return _even(costs_U, len(owners)) if one_a_rank else _even_ranks(costs_U, owners)


def load_of_ranks(recipe: Recipe, pp: int) -> list[float]:
    """Return the operations per token of each pipeline rank in the longest stage of the curriculum, ÷ their mean."""
    costs, parts = dict(zip(units_of(recipe.model), _costs(recipe), strict=True)), cut(recipe, pp)
    loads = [0.0] * pp
    for part, owner in zip(parts, ranks_of_stages(recipe.parallel.pipeline, pp), strict=True):
        loads[owner] += sum(costs[unit] for unit in part.units)
    return [load * pp / sum(loads) for load in loads]


def longest_stage(recipe: Recipe) -> StageConfig:
    """Return the stage of the curriculum with the most tokens."""
    return max(recipe.stages.values(), key=lambda stage: stage.tokens)


def _costs(recipe: Recipe) -> tuple[float, ...]:
    stage = longest_stage(recipe)
    return unit_costs(recipe.model, stage.seq_len, trained_heads(recipe.model, stage))


def _written(model: ModelConfig, layers: tuple[int, ...], costs_U: tuple[float, ...]) -> tuple[int, ...]:
    """Return the number of units of each stage with these numbers of layers.

    The units behind the layers go to the last stage with layers and to the stages of 0 layers that follow it.
    """
    behind = 1 + 2 * model.num_layers
    last = max(stage for stage, count in enumerate(layers) if count)
    before = [2 * count + (stage == 0) for stage, count in enumerate(layers[: last + 1])]  # the embedding is a unit
    own = before.pop()
    first, *rest = _even((sum(costs_U[behind - own : behind]), *costs_U[behind:]), len(layers) - last)
    return *before, own + first - 1, *rest


def _even(costs_U: tuple[float, ...], stages: int) -> tuple[int, ...]:
    """Return the number of units of each stage, at least one.

    The most expensive stage is as cheap as possible, and the others are as even as that allows. Computed by dynamic
    programming in O(U² · S).
    """
    # One expensive unit can decide the maximum, which then says nothing about other stages; the sum of squares does.
    dearest = _best(costs_U, stages, lambda cost, rest: max(cost, rest), float("inf"))[0]
    return _best(costs_U, stages, lambda cost, rest: cost * cost + rest, dearest * (1 + 1e-9))[1]


def _best(
    costs_U: tuple[float, ...], stages: int, join: Callable[[float, float], float], limit: float
) -> tuple[float, tuple[int, ...]]:
    """Return the smallest value of join(first stage, join(second stage, …)), and the lengths of its stages.

    No stage may cost more than `limit`.
    """

    @cache
    def best(start: int, left: int) -> tuple[float, tuple[int, ...]]:
        """Return the best split of the units from `start` on into `left` stages."""
        if left == 1:
            cost = sum(costs_U[start:])
            return (join(cost, 0.0) if cost <= limit else float("inf")), (len(costs_U) - start,)
        found = (float("inf"), ())
        cost = 0.0
        for length in range(1, len(costs_U) - start - left + 2):
            cost += costs_U[start + length - 1]
            if cost > limit:
                break
            rest, lengths = best(start + length, left - 1)
            found = min(found, (join(cost, rest), (length, *lengths)))
        return found

    return best(0, stages)


def _even_ranks(costs_U: tuple[float, ...], owners: Sequence[int]) -> tuple[int, ...]:
    """Return the number of units of each stage, at least one, if ranks have several stages: their sum counts.

    From several cuts, one stage gives one or two units to another as long as that makes the most expensive rank cheaper
    or the ranks more even; the stages between them move by as many. The best of the results is taken. It need not be
    the best cut there is.
    """
    sums, stages = [0.0, *accumulate(costs_U)], len(owners)

    def dearest(lengths: Sequence[int]) -> tuple[float, float]:
        loads, start = [0.0] * (max(owners) + 1), 0
        for length, owner in zip(lengths, owners, strict=True):
            loads[owner] += sums[start + length] - sums[start]
            start += length
        mean = sums[-1] / len(loads)  # rounded, so that no move is made for the sake of a sum's last bits
        return round(max(loads) / mean, 9), round(sum(load * load for load in loads) / mean**2, 9)

    def improved(lengths: tuple[int, ...]) -> tuple[int, ...]:
        while True:
            moves = (
                (k, a, b) for k in (1, 2) for a in range(stages) if lengths[a] > k for b in range(stages) if a != b
            )
            moved = (tuple(n - k * (s == a) + k * (s == b) for s, n in enumerate(lengths)) for k, a, b in moves)
            best = min(moved, key=dearest, default=lengths)
            if dearest(best) >= dearest(lengths):
                return lengths
            lengths = best

    each, over = divmod(len(costs_U), stages)
    by_number = tuple(each + (stage < over) for stage in range(stages))
    return min((improved(start) for start in (_even(costs_U, stages), by_number, by_number[::-1])), key=dearest)
