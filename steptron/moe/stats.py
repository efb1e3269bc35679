"""What can be seen of an MoE layer while it works: sums and maxima of one forward pass, on the device, without waiting for it.

    routing                    → router_stats ─────────┐
    gate, up, h, result by row → by_expert (segments) ─┼─→ Observation ─→ layer.observer.observe
    gate, up of the shared one → shared_stats ─────────┘

All are sums over tokens, rows or elements, or maxima: those of micro-batches and of ranks add up (or their maximum is taken), and means
are made of them at the very end. Only real rows count; padding and rows that are nobody's do not.

Legend: N tokens, E experts, K choices a token, P rows of the experts (padding included), I expert FFN, D hidden, F columns of a table.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from steptron.moe.dispatch import Plan
from steptron.moe.router import Routing


def sampled_columns(width: int) -> int:
    """The first eighth of the columns of an expert's FFN, which alignment is taken from: columns have no order, and it costs less."""
    return -(-width // 8)


class SwigluRows(NamedTuple):
    """Of each row at the FFN intermediate, fp32; before clipping where not said otherwise."""

    h_square: Float[Tensor, "P"]
    """Σ_I h², h the clipped product without the weight of the choice."""
    gate_up: Float[Tensor, "P"]
    """Σ gate · up over the sampled columns."""
    gate_square: Float[Tensor, "P"]
    """Σ gate² over the sampled columns."""
    up_square: Float[Tensor, "P"]
    """Σ up² over the sampled columns."""
    peak_gate: Float[Tensor, "P"]
    """max_I silu(gate), where it is positive: nothing else is clipped, and an expert's is at least 0."""
    peak_up: Float[Tensor, "P"]
    """max_I |up|."""
    clipped: Float[Tensor, "P"]
    """Elements that the limit cut: silu(gate) > L and |up| > L, each counted by itself; 0 without a limit."""


class RowStats(NamedTuple):
    """All that is known of each row of the experts."""

    swiglu: SwigluRows
    """At the intermediate."""
    out_norm: Float[Tensor, "P"]
    """Euclidean norm of the expert's result, without the weight of the choice."""


class ExpertStats(NamedTuple):
    """Of each expert of a rank, over its rows of one forward pass; fp32. `rows` · `ffn_size` elements each of gate and up."""

    rows: Tensor
    """Tokens that the expert computed [E]."""
    h_square: Tensor
    """Σ h²: the RMS at the FFN intermediate is √(h_square / (rows · I))."""
    gate_up: Tensor
    """Σ gate · up over the sampled columns; ÷ √(gate_square · up_square) it is the alignment of gate and up, −1 to 1."""
    gate_square: Tensor
    """Σ gate² over the sampled columns."""
    up_square: Tensor
    """Σ up² over the sampled columns."""
    out_norm: Tensor
    """Σ over rows of the norm of the expert's result; ÷ rows: its mean. Where ranks hold columns of an expert (etp): of their part."""
    clipped: Tensor
    """Elements of gate and up that the limit cut; ÷ (2 · rows · I): the clipped fraction."""
    peak_gate: Tensor
    """max silu(gate) before clipping; 0 without rows."""
    peak_up: Tensor
    """max |up| before clipping; 0 without rows."""


class RouterStats(NamedTuple):
    """Of the tokens of one forward pass. Probabilities are normalised over the experts for each token."""

    tokens: int
    """N."""
    mass_E: Tensor
    """Σ_n probability of each expert; ÷ N: its mean share."""
    confidence: Tensor
    """Σ_n probability of the selected experts together."""
    entropy: Tensor
    """Σ_n −Σ_e p ln p; at most N · ln E."""
    margin: Tensor
    """Σ_n lowest selected score − highest other score (sigmoid + bias)."""
    logit_max: Tensor
    """Largest |logit|."""


class SharedStats(NamedTuple):
    """Of the shared expert, over the tokens of one forward pass; fp32 scalars."""

    clipped: Tensor
    """Elements of gate and up that the limit cut."""
    peak_gate: Tensor
    """max silu(gate) before clipping."""
    peak_up: Tensor
    """max |up| before clipping."""


class Observation(NamedTuple):
    """One forward pass of one MoE layer; the same pass is shown once, also where backward repeats it."""

    routing: Routing
    """The choices themselves."""
    counts_E: Int64[Tensor, "E"]
    """Tokens by expert, of the tokens of this rank; the sum is N·K."""
    router: RouterStats
    """Of the tokens of this rank."""
    experts: ExpertStats
    """Of the experts of this rank, and of all tokens that came to them."""
    shared: SharedStats
    """Of the shared expert."""
    routed_norm: Tensor
    """Σ_n of the norm of what the routed experts add."""
    shared_norm: Tensor
    """Σ_n of the norm of what the shared expert adds; routed_norm ÷ shared_norm is their ratio."""


@runtime_checkable
class MoeObserver(Protocol):
    """Sees each forward pass of the layer that it is hung on. Nothing in an observation carries a gradient."""

    def observe(self, seen: Observation) -> None: ...


@torch.no_grad()
def router_stats(routing: Routing, bias_E: Tensor) -> RouterStats:
    """Statistics of the choices; `bias_E` as it was when they were made."""
    p_NE = routing.probabilities_NE.detach()
    total_N = p_NE.sum(dim=1)
    scale_N = 1 / (total_N + 1e-20)
    # Σ_e (p/s) ln(p/s) = (Σ_e p ln p)/s − ln s where s = Σ_e p: one pass over [N, E].
    plogp_N = -torch.special.entr(p_NE).sum(dim=1)
    scores_NE = p_NE + bias_E
    selected_NK = scores_NE.gather(1, routing.experts_NK)
    others_NE = scores_NE.scatter_(1, routing.experts_NK, float("-inf"))
    return RouterStats(
        tokens=p_NE.shape[0],
        mass_E=scale_N @ p_NE,
        confidence=(p_NE.gather(1, routing.experts_NK).sum(dim=1) * scale_N).sum(),
        entropy=(total_N.log() * total_N * scale_N - plogp_N * scale_N).sum(),
        margin=(selected_NK.amin(dim=1) - others_NE.amax(dim=1)).sum(),
        logit_max=_peak(routing.logits_NE),
    )


@torch.no_grad()
def by_expert(rows: RowStats, plan: Plan) -> ExpertStats:
    """Sums and maxima over each expert's rows."""
    # A choice elsewhere marks a row that is in no group.
    real_P = torch.zeros_like(plan.source_P, dtype=torch.bool).index_fill_(0, plan.slots_NK.flatten(), True)
    swiglu = rows.swiglu
    table_FP = torch.stack(
        (
            swiglu.h_square,
            swiglu.gate_up,
            swiglu.gate_square,
            swiglu.up_square,
            rows.out_norm,
            swiglu.clipped,
            swiglu.peak_gate,
            swiglu.peak_up,
        )
    )
    table_FP = torch.where(real_P, table_FP, 0.0)
    sums_FE = _segments(table_FP[:-2], "sum", plan.groups_E)
    peaks_FE = _segments(table_FP[-2:], "max", plan.groups_E)
    return ExpertStats(plan.counts_E.to(sums_FE.dtype), *sums_FE.unbind(0), *peaks_FE.unbind(0))


@torch.no_grad()
def shared_stats(gate: Tensor, up: Tensor, limit: float | None) -> SharedStats:
    """Of the shared expert's gate and up [..., I], before they are clipped."""
    # aminmax, of which one half is not asked for: on a CPU it takes half of amax's time.
    peak_gate, peak_up = F.silu(gate.aminmax().max.float()).clamp_(min=0), _peak(up)
    clipped = peak_gate.new_zeros(())
    # On a CPU it costs nothing to see first whether there is something to count.
    if limit is not None and (gate.device.type != "cpu" or torch.maximum(peak_gate, peak_up) > limit):
        clipped = count_clipped(gate, up, limit).sum().float()
    return SharedStats(clipped, peak_gate, peak_up)


def count_clipped(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """Elements cut by the limit, by row: those of gate and those of up, each counted by itself."""
    return (F.silu(gate) > limit).sum(dim=-1) + (up.abs() > limit).sum(dim=-1)


def _peak(values: Tensor) -> Tensor:
    """max |values|, in one pass and without a copy."""
    low, high = torch.aminmax(values.detach())
    return torch.maximum(-low, high).float()


def _segments(table_FP: Tensor, reduce: str, sizes_E: Tensor) -> Tensor:
    """[F, E]: each expert's neighbouring rows together, in the order of the rows, so that no atomics reorder sums."""
    columns, length = table_FP.shape
    # One long row, cut into the segments of each column and what is left of it.
    sizes = torch.cat([sizes_E, (length - sizes_E.sum())[None]]).repeat(columns)
    reduced = torch.segment_reduce(table_FP.flatten(), reduce, lengths=sizes, axis=0, unsafe=True, initial=0.0)
    return reduced.view(columns, -1)[:, :-1]
