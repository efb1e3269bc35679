"""The memory that a rank keeps for backward passes, counted on the meta device, where nothing is computed.

    one unit of each kind ─ forward ─► bytes still alive afterwards
    Σ units of a pipeline stage × micro-batches in flight ─► bytes of each pipeline rank

A rank's tokens are those of a micro-batch over its sequence's ranks (cp, tp), and its experts get an even load. Buffers
that live within one operation, chunks of the loss and keys gathered under `cp_method: all_gather` come on top.

Legend: N tokens, K choices, D hidden, P pipeline ranks.
"""

from collections.abc import Callable
from dataclasses import replace
from math import ceil
from typing import Any

import torch
from torch import Tensor

from steptron.config.schema import ModelConfig, Recipe, RecomputeConfig, StageConfig, layer_kinds, trained_heads
from steptron.model.heads import TokenLoss
from steptron.model.inputs import Inputs, Rows
from steptron.model.parts import Part, Unit, following, units_of
from steptron.model.transformer import Transformer, apply_stage
from steptron.moe.backend import Backend
from steptron.moe.dispatch import Arriving, Dispatched
from steptron.moe.experts import Experts
from steptron.moe.grouped_experts import by_products, grouped_product
from steptron.parallel.mesh import Layout
from steptron.parallel.pipeline_split import cut, ranks_of_stages
from steptron.parallel.recompute import apply_recompute
from steptron.torch_internals import TorchDispatchMode, tree_leaves, watch_storage

BYTES = {"fp32": 4, "bf16": 2}
"""The bytes of a value in each precision."""


Kept = dict[Unit, int]
"""The bytes that a micro-batch keeps in each unit of the network until its backward pass."""


def rank_activations(recipe: Recipe, stage: StageConfig, layout: Layout, cuda: bool) -> list[int]:
    """Return the bytes that the ranks of each pipeline rank keep at most during a step of this stage."""
    parallel, pp = recipe.parallel, layout.dense["pp"]
    kept = kept_by_micro_batch(recipe, stage, layout, cuda)
    bytes_of_stages = [sum(kept[unit] for unit in part.units) for part in cut(recipe, pp)]
    owners = ranks_of_stages(parallel.pipeline, pp)
    count = max(1, stage.batch_size // (stage.micro_batch * layout.data_ranks))
    found = []
    for rank in range(pp):
        own = [size for size, owner in zip(bytes_of_stages, owners, strict=True) if owner == rank]
        in_flight = most_in_flight(parallel.pipeline.schedule if pp > 1 else "1f1b", rank, pp, len(own), count)
        found.append(in_flight * max(own))
    return found


def most_in_flight(schedule: str, rank: int, pp: int, stages: int, micro_batches: int) -> int:
    """Return how many (micro-batch, stage) pairs a pipeline rank has between their forward and backward pass at most.

    `stages` is the number of stages of the rank. Sources: 1F1B and interleaved, arXiv 2104.04473, section 2.2; ZB-V,
    arXiv 2401.10241, section 6; DualPipe-V as torch has it.
    """
    pairs = micro_batches * stages
    if schedule == "1f1b":
        return min(pairs, pp - rank)
    if schedule == "interleaved":
        return min(pairs, 2 * (pp - rank - 1) + (stages - 1) * pp + 1)
    return min(pairs, 2 * pp + (schedule == "dualpipe-v"))


def kept_by_micro_batch(recipe: Recipe, stage: StageConfig, layout: Layout, cuda: bool) -> Kept:
    """Return the bytes that one micro-batch of this stage keeps, by unit."""
    model, trained = recipe.model, trained_heads(recipe.model, stage)
    count = _Counter(recipe, stage, layout, cuda)
    kinds, every = layer_kinds(model), recipe.parallel.recompute.every

    kept: Kept = {}
    alike: dict[tuple, int] = {}
    for unit in units_of(model):
        n, layer = unit.number, unit.kind in ("attention", "ffn")
        if not layer and n > trained:
            kept[unit] = 0
            continue
        form = (kinds[n], n < model.num_dense_layers, n % every == 0) if layer else (n > 0,)
        if (unit.kind, *form) not in alike:
            alike[unit.kind, *form] = count.unit(unit)
        kept[unit] = alike[unit.kind, *form]
    return kept


class _Counter:
    """Runs parts of the network on the meta device as one rank has them. The meta device stands for a GPU."""

    def __init__(self, recipe: Recipe, stage: StageConfig, layout: Layout, cuda: bool) -> None:
        self._stage, self._layout = stage, layout
        moves = layout.expert["ep"] * layout.expert["etp"] > 1
        self._capacity = None if recipe.kernels.capacity == "exact" or not moves else recipe.kernels.capacity
        recompute = recipe.parallel.recompute
        # On a CPU experts never keep the gathered rows or the product.
        always = () if cuda else ("permutation", "silu")
        self._recompute = RecomputeConfig(parts=tuple({*recompute.parts, *always}), every=recompute.every)
        self._scale = BYTES[recipe.precision] // BYTES["bf16"]
        self._tokens = stage.micro_batch * stage.seq_len // (layout.dense["cp"] * layout.dense["tp"])
        # The chunks of the loss are gone after the forward pass, so that one is as good as many.
        self._model = replace(recipe.model, loss_chunk=self._tokens)

    def unit(self, unit: Unit) -> int:
        """Return the bytes that are alive after the forward pass of a unit, without its parameters and its result.

        An output keeps the gradients of its loss (nn/loss.py).
        """
        trained = trained_heads(self._model, self._stage)
        part = Part((unit,), following(self._model, unit))
        with torch.device("meta"):
            model = Transformer(self._model, part).bfloat16()
            for moe in model.moe_layers().values():
                moe.experts, moe.dispatcher = self._experts(self._model), _EvenShare(self._layout)
                moe.capacity = self._capacity
        apply_recompute(model, self._recompute)
        apply_stage(model.train(), self._stage, num_groups=self._layout.expert["ep"])
        S = self._tokens + 1 + trained
        rows = Rows.unweighted(torch.zeros(1, S, dtype=torch.int64), torch.zeros(1, S, dtype=torch.int32))
        inputs = Inputs.from_rows(rows, self._tokens).to("meta")
        sums = None if part.first else torch.zeros(trained + 2, device="meta")
        made = _Allocations()
        with made:
            out = model(*(self._state() for _ in part.received(trained)), sums=sums, inputs=inputs)
            loss = TokenLoss()(model, out, inputs)
        return made.alive(besides=(out, loss, list(model.parameters()), list(model.buffers()))) * self._scale

    def _state(self) -> Tensor:
        """Return a state that a unit receives. It counts where backward needs it."""
        hidden = torch.empty(1, self._tokens, self._model.hidden_size, dtype=torch.bfloat16, device="meta")
        return hidden.requires_grad_()

    def _experts(self, model: ModelConfig) -> Experts:
        held, etp = model.moe.num_experts // self._layout.expert["ep"], self._layout.expert["etp"]
        experts = Experts(held, model.hidden_size, model.moe.ffn_size // etp).bfloat16()
        experts.backend = Backend("counted", by_products(grouped_product, _Swiglu.apply), exact=False)
        return experts


class _Swiglu(torch.autograd.Function):
    """Keeps what the SwiGLU of every fast back end keeps: gate, up and the weights of the rows."""

    @staticmethod
    def forward(
        ctx: Any, gate_PI: Tensor, up_PI: Tensor, weights_P: Tensor, limit: float | None, seen_SP: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(gate_PI, up_PI, weights_P)
        return torch.empty_like(gate_PI)


class _EvenShare:
    """A dispatcher of ranks that are not there: as many choices arrive as leave."""

    def __init__(self, layout: Layout) -> None:
        self._ep, self._etp = layout.expert["ep"], layout.expert["etp"]

    def dispatch(
        self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor, capacity: float | None = None
    ) -> Arriving[Dispatched]:
        x, experts, weights = (t.repeat(self._etp, 1) if self._etp > 1 else t for t in (x_ND, experts_NK, weights_NK))
        rows = None if capacity is None else ceil(capacity * experts.numel())
        return lambda: Dispatched(x, experts // self._ep, weights, rows, None)

    def combine(self, y_ND: Tensor, way_back: None) -> Arriving[Tensor]:
        return lambda: y_ND[: len(y_ND) // self._etp]


class _Allocations(TorchDispatchMode):
    """Records the storages that operations make, and tells which of them are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[Callable[[], bool], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                number, is_gone, size = watch_storage(tensor)
                if number not in self._made or self._made[number][0]():
                    self._made[number] = is_gone, size
        return out

    def alive(self, besides: object) -> int:
        """Return the bytes that are still held, without those of the tensors in `besides`."""
        left_out = {watch_storage(t)[0] for t in tree_leaves(besides) if isinstance(t, Tensor)}
        return sum(size for number, (is_gone, size) in self._made.items() if number not in left_out and not is_gone())
