"""Host waits of a training pass under every kind of layout, found on the meta device without a GPU.

    python benchmarks/gpu_waits.py

Two pipeline stages of the 196B network with a few layers, the first and the last, run forward and backward as rank 0 of
a layout would run them, with the loss of all heads. Any operation after which the host would know a value of the device
raises an error there. With exact sizes only the exchange of counts is left, once for each expert layer and pass; with a
capacity nothing is.

FSDP is left out: none of its decisions depends on a value of the device.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from gpu_count import Counted, Counting, fake_ranks, stand_ins

from steptron.config.resolve import resolve
from steptron.config.schema import (
    DenseMeshConfig,
    ExpertMeshConfig,
    ParallelConfig,
    RecomputeConfig,
)
from steptron.model.heads import TokenLoss
from steptron.model.inputs import Inputs, Rows
from steptron.model.parts import parts_of, units_of
from steptron.model.transformer import Transformer, apply_stage
from steptron.moe.experts import make_backend
from steptron.parallel.apply import split
from steptron.parallel.cp import sequence_pieces
from steptron.parallel.elementwise import apply_elementwise
from steptron.parallel.mesh import build_meshes, resolve_layout
from steptron.parallel.network import final_outputs
from steptron.parallel.objective import Objective

RANKS, TOKENS = 16, 512
D, E = DenseMeshConfig, ExpertMeshConfig
ALL_PARTS = RecomputeConfig(parts=("attention", "ffn", "norm", "silu", "permutation"))
LAYOUTS = {
    "pp2, ep8": ParallelConfig(pp=2, expert=E(ep=8)),
    "pp2, ep8, gathered": ParallelConfig(pp=2, expert=E(ep=8), ep_dispatch="all_gather"),
    "pp2, tp2, ep8": ParallelConfig(pp=2, dense=D(tp=2), expert=E(ep=8)),
    "pp2, tp2, ep4, etp2": ParallelConfig(pp=2, dense=D(tp=2), expert=E(ep=4, etp=2)),
    "pp2, cp2, ep8": ParallelConfig(pp=2, dense=D(cp=2), expert=E(ep=8)),
    "pp2, cp2 gathered, ep8": ParallelConfig(pp=2, dense=D(cp=2), expert=E(ep=8), cp_method="all_gather"),
    "pp2, cp2, tp2, ep8, recomputed": ParallelConfig(pp=2, dense=D(cp=2, tp=2), expert=E(ep=8), recompute=ALL_PARTS),
}
LAYERS, FIRST = 6, 4
"""Three dense layers and one with experts are a stage; then two with experts, and the heads."""
EXPERT_LAYERS = 3


def count_waits(parallel: ParallelConfig, capacity: float | None) -> int:
    """Return how often rank 0 waits in one micro-batch under this layout. Raises `HostWait` at a wait that is not
    known."""
    flash = resolve("step3p5_flash")
    recipe = replace(flash, model=replace(flash.model, num_layers=LAYERS), parallel=parallel)
    lengths = 1 + 2 * FIRST, len(units_of(recipe.model)) - 1 - 2 * FIRST
    layout, counted = resolve_layout(parallel, RANKS), Counted()
    cp, tp = layout.dense["cp"], layout.dense["tp"]
    held = recipe.model.moe.num_experts // layout.expert["ep"]
    long = TOKENS + 1 + recipe.model.num_mtp_heads
    rows = Rows.unweighted(torch.zeros(1, long, dtype=torch.int64), torch.zeros(1, long, dtype=torch.int32))
    inputs = Inputs.from_rows(rows, TOKENS, sequence_pieces(TOKENS, cp, 0))
    with fake_ranks(RANKS), stand_ins(counted, TOKENS // (cp * tp), held, recipe.model.moe):
        meshes = build_meshes(layout, "cpu")
        for part in parts_of(recipe.model, lengths):
            with torch.device("meta"):
                network = Transformer(recipe.model, part).bfloat16()
            for moe in network.moe_layers().values():
                moe.router.float()
                moe.experts.backend, moe.capacity = make_backend("triton"), capacity
            split(network, recipe, meshes)
            apply_elementwise(network, "triton", compiled=False)
            apply_stage(network.train(), next(iter(recipe.stages.values())), num_groups=layout.expert["ep"])
            with Counting(counted):
                _pass(network, inputs.to("meta"), TOKENS // (cp * tp))
    return counted.waits


def _pass(network: Transformer, inputs: Inputs, tokens: int) -> None:
    """Run a pipeline stage forward and backward."""
    trained, part = len(inputs.tokens_HBT) - 1, network.part
    states = [
        torch.empty(1, tokens, network.config.hidden_size, dtype=torch.bfloat16, device="meta").requires_grad_()
        for _ in part.received(trained)
    ]
    sums = None if part.first else torch.zeros(trained + 2, device="meta").requires_grad_()
    out = final_outputs(network(*states, sums=sums, inputs=inputs))
    scale_H = torch.ones(trained + 1, device="meta")
    total, _ = Objective(loss=TokenLoss(), scale_H=scale_H, balance_scale=1.0)(network, out, inputs)
    torch.autograd.backward((total, *out.states), (None, *map(torch.empty_like, out.states)))


def known_waits(parallel: ParallelConfig, capacity: float | None) -> int:
    """Return how often the host may wait: once for each dispatch with exact sizes."""
    dispatches = EXPERT_LAYERS * (2 if "ffn" in parallel.recompute.parts else 1)
    return dispatches if capacity is None else 0


def cases() -> Iterator[tuple[str, float | None]]:
    """Yield layouts and capacities. `all_gather` with exact sizes waits in a place that the counter does not know."""
    for name, parallel in LAYOUTS.items():
        yield from ((name, size) for size in (None, 1.25) if size or parallel.ep_dispatch != "all_gather")


def main() -> int:
    """Print the waits of each layout; 1 if there are more than are known."""
    missed = 0
    for name, capacity in cases():
        waits, known = count_waits(LAYOUTS[name], capacity), known_waits(LAYOUTS[name], capacity)
        missed += waits > known
        print(f"{name:32} capacity {'exact' if capacity is None else capacity:5}  {waits} waits (at most {known})")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
