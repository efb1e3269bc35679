"""The activations of a rank are compared with autograd's own saved tensors, torch's schedules and sizes by hand."""

from dataclasses import replace

import pytest
import torch
from steptron.config.kernels import KernelsConfig
from steptron.config.resolve import resolve
from steptron.config.schema import PipelineConfig, Recipe, RecomputeConfig
from steptron.doctor.activations import Kept, kept_by_micro_batch, most_in_flight, rank_activations
from steptron.model.inputs import Inputs, Rows
from steptron.model.parts import Part, Unit
from steptron.model.transformer import Transformer, apply_stage
from steptron.moe.experts import make_backend
from steptron.parallel.mesh import Layout, resolve_layout
from steptron.parallel.pipeline_split import num_stages, ranks_of_stages
from torch.distributed.pipelining import schedules

from bare_stages import SCHEDULES, BareStage

N = 4096
EP = 8


@pytest.fixture(scope="module")
def flash() -> Recipe:
    return resolve("step3p5_flash", ["parallel.recompute.parts=[]"], None)


def kept(recipe: Recipe, *parts: str, cuda: bool = True) -> Kept:
    changed = replace(recipe, parallel=replace(recipe.parallel, recompute=RecomputeConfig(parts=parts)))  # pyright: ignore
    return kept_by_micro_batch(changed, recipe.stages["pre-1"], layout_of(recipe), cuda)


def layer_of(kept: Kept, layer: int) -> int:
    return kept[Unit("attention", layer)] + kept[Unit("ffn", layer)]


def layout_of(recipe: Recipe) -> Layout:
    return resolve_layout(recipe.parallel, 64)


def saved_by(recipe: Recipe, part: Part) -> int:
    """Return the bytes that autograd says it saves, of a part with all experts on one rank."""
    with torch.device("meta"):
        model = Transformer(recipe.model, part).bfloat16()
        hidden = torch.empty(1, N, recipe.model.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        sums = torch.zeros(5)
    for moe in model.moe_layers().values():
        moe.experts.backend = make_backend("grouped")
    apply_stage(model, recipe.stages["pre-1"], num_groups=EP)
    rows = Rows.unweighted(torch.zeros(1, N + 4, dtype=torch.int64), torch.zeros(1, N + 4, dtype=torch.int32))
    parameters = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in parameters:
            found[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(hidden, sums=sums, inputs=Inputs.from_rows(rows, N).to("meta"))
    assert out is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize("layer", [0, 1], ids=["full", "sliding"])
def test_a_dense_layer_keeps_what_autograd_saves(flash: Recipe, layer: int) -> None:
    saved = saved_by(flash, Part((Unit("attention", layer), Unit("ffn", layer)), Unit("output", 0)))
    assert layer_of(kept(flash), layer) == pytest.approx(saved, rel=0.02)


@pytest.mark.parametrize(
    ("parts", "values"),
    [
        (("permutation",), lambda m, P: P * m.hidden_size),
        (("silu",), lambda m, P: P * m.moe.ffn_size + N * m.moe.shared_ffn_size),
        (("permutation", "silu"), lambda m, P: P * (m.hidden_size + m.moe.ffn_size) + N * m.moe.shared_ffn_size),
    ],
    ids=["rows", "products", "both"],
)
def test_what_is_recomputed_is_not_kept(flash: Recipe, parts: tuple[str, ...], values) -> None:
    """An expert layer in bf16 has the rows of all choices, and some padding."""
    rows = N * flash.model.moe.top_k
    saved = layer_of(kept(flash), 5) - layer_of(kept(flash, *parts), 5)
    assert saved == pytest.approx(2 * values(flash.model, rows), rel=0.02)


def test_buffers_of_a_fixed_capacity_count(flash: Recipe) -> None:
    """A row more takes the gathered token, gate, up and their product."""
    layers = [layer_of(kept(replace(flash, kernels=KernelsConfig(capacity=c))), 5) for c in ("exact", 1.0, 1.5)]
    assert layers[1] == pytest.approx(layers[0], rel=0.01)
    more = N * flash.model.moe.top_k // 2 * (flash.model.hidden_size + 3 * flash.model.moe.ffn_size) * 2
    assert layers[2] - layers[1] == pytest.approx(more, rel=0.01)


def test_recomputed_sublayers_keep_their_inputs_alone(flash: Recipe) -> None:
    everything = layer_of(kept(flash, "attention", "ffn", "norm"), 5)
    inputs = 2 * 2 * N * flash.model.hidden_size
    assert inputs <= everything <= 2.2 * inputs, "two sublayers, and the router"


def test_a_cpu_keeps_gate_and_up_of_its_experts(flash: Recipe) -> None:
    both = layer_of(kept(flash, "permutation", "silu"), 5)
    assert layer_of(kept(flash, cuda=False), 5) == pytest.approx(both, rel=0.01)


def test_ranks_of_a_sequence_share_it(flash: Recipe) -> None:
    """Twice the tokens over twice the ranks are as many, whichever axis they lie on."""
    stage = flash.stages["pre-1"]
    alone = rank_activations(flash, stage, layout_of(flash), cuda=True)
    for axis in ("cp", "tp"):
        dense = replace(flash.parallel.dense, **{axis: 2})
        shared = replace(flash, parallel=replace(flash.parallel, dense=dense))
        longer = replace(stage, seq_len=2 * stage.seq_len)
        assert rank_activations(shared, longer, layout_of(shared), cuda=True) == alone


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pp", [2, 4, 8])
def test_no_more_pairs_are_in_flight_than_in_torch_s_schedule(schedule: str, pp: int) -> None:
    config, micro_batches = PipelineConfig(schedule=schedule), 4 * pp  # pyright: ignore[reportArgumentType]
    stages, owners = num_stages(config, pp), ranks_of_stages(config, pp)
    mine = [BareStage(number, stages, pp) for number, owner in enumerate(owners) if owner == 0]
    order = SCHEDULES[schedule](mine, micro_batches).pipeline_order
    for rank in range(pp):
        alive, most = 0, 0
        for action in (action for action in order[rank] if action is not None):
            kinds = [action, *(action.sub_actions or ())]
            for one in kinds:
                forward = one.computation_type is schedules._ComputationType.FORWARD
                done = one.computation_type in (
                    schedules._ComputationType.FULL_BACKWARD,
                    schedules._ComputationType.BACKWARD_INPUT,
                )
                alive += forward - done
                most = max(most, alive)
        said = most_in_flight(schedule, rank, pp, stages // pp, micro_batches)
        assert most <= said <= most + 2, f"rank {rank}"


def test_1f1b_has_as_many_in_flight_as_ranks_follow() -> None:
    assert [most_in_flight("1f1b", rank, 4, 1, 100) for rank in range(4)] == [4, 3, 2, 1]
    assert [most_in_flight("1f1b", rank, 4, 1, 2) for rank in range(4)] == [2, 2, 2, 1]
