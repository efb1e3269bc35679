"""Statistics of one MoE forward pass: router, each expert's activations, shared expert; sums and maxima on the device.

    routing                    → router_stats ─────────┐
    gate, up, h, result by row → by_expert (segments) ─┼─→ Observation ─→ layer.observer.observe
    gate, up of the shared one → shared_stats ─────────┘

Every value is a maximum, or a sum over tokens, rows or elements. So values of micro-batches and ranks are added (or
their maximum is taken), and means are computed last. Padding and unused rows do not count.

Legend: N tokens, E experts, K choices a token, P rows of the experts (padding included), I expert FFN, D hidden, F
columns of a table.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from steptron.moe.dispatch import Plan
from steptron.moe.router import Routing


def sampled_columns(width: int) -> int:
    """Return how many of an expert's FFN columns are sampled for its alignment: the first eighth.

    The order of the columns has no meaning, so any sample will do; a small one costs less.
    """
    return -(-width // 8)


class SwigluRows(NamedTuple):
    """Statistics of each row at the FFN intermediate, fp32; before clipping unless stated otherwise."""

    h_square: Float[Tensor, "P"]
    """Σ_I h², where h is the clipped product without the weight of the choice."""
    gate_up: Float[Tensor, "P"]
    """Σ gate · up over the sampled columns."""
    gate_square: Float[Tensor, "P"]
    """Σ gate² over the sampled columns."""
    up_square: Float[Tensor, "P"]
    """Σ up² over the sampled columns."""
    peak_gate: Float[Tensor, "P"]
    """max_I silu(gate) where positive: only positive values are clipped, and an expert's peak is at least 0."""
    peak_up: Float[Tensor, "P"]
    """max_I |up|."""
    clipped: Float[Tensor, "P"]
    """Elements clipped by the limit: silu(gate) > L and |up| > L, each counted separately; 0 without a limit."""


class RowStats(NamedTuple):
    """All statistics of each row of the experts."""

    swiglu: SwigluRows
    """Statistics at the FFN intermediate."""
    out_norm: Float[Tensor, "P"]
    """Euclidean norm of the expert's result without the weight of the choice."""


class ExpertStats(NamedTuple):
    """Statistics of each expert of a rank over its rows of one forward pass; fp32 [E].

    Each of gate and up has `rows` · `ffn_size` elements.
    """

    rows: Tensor
    """Tokens computed by the expert [E]."""
    h_square: Tensor
    """Σ h²: the RMS at the FFN intermediate is √(h_square / (rows · I))."""
    gate_up: Tensor
    """Σ gate · up over the sampled columns; ÷ √(gate_square · up_square), it is the alignment of gate and up, −1 to 1.
    """
    gate_square: Tensor
    """Σ gate² over the sampled columns."""
    up_square: Tensor
    """Σ up² over the sampled columns."""
    out_norm: Tensor
    """Σ over rows of the norm of the expert's result; ÷ rows: its mean.

    With expert tensor parallelism (etp), the norm is that of the rank's part of the result.
    """
    clipped: Tensor
    """Elements of gate and up clipped by the limit; ÷ (2 · rows · I): the clipped fraction."""
    peak_gate: Tensor
    """max silu(gate) before clipping; 0 without rows."""
    peak_up: Tensor
    """max |up| before clipping; 0 without rows."""


class RouterStats(NamedTuple):
    """Statistics of the router over the tokens of one forward pass.

    Probabilities are normalised over the experts for each token.
    """

    tokens: int
    """Number of tokens, N."""
    mass_E: Tensor
    """Σ_n probability of each expert [E]; ÷ N: its mean share."""
    confidence: Tensor
    """Σ_n total probability of the selected experts."""
    entropy: Tensor
    """Σ_n −Σ_e p ln p; at most N · ln E."""
    margin: Tensor
    """Σ_n (lowest selected score − highest other score); a score is sigmoid + bias."""
    logit_max: Tensor
    """Largest |logit|."""


class SharedStats(NamedTuple):
    """Statistics of the shared expert over the tokens of one forward pass; fp32 scalars."""

    clipped: Tensor
    """Elements of gate and up clipped by the limit."""
    peak_gate: Tensor
    """max silu(gate) before clipping."""
    peak_up: Tensor
    """max |up| before clipping."""


class Observation(NamedTuple):
    """The statistics of one forward pass of one MoE layer; recomputation in backward is not observed again."""

    routing: Routing
    """The routing itself, without gradients."""
    counts_E: Int64[Tensor, "E"]
    """Choices of each expert, over the tokens of this rank; they sum to N·K."""
    router: RouterStats
    """Statistics over the tokens of this rank."""
    experts: ExpertStats
    """Statistics of the experts of this rank, over all tokens dispatched to them."""
    shared: SharedStats
    """Statistics of the shared expert."""
    routed_norm: Tensor
    """Σ_n norm of the routed experts' output."""
    shared_norm: Tensor
    """Σ_n norm of the shared expert's output; routed_norm ÷ shared_norm is their ratio."""


@runtime_checkable
class MoeObserver(Protocol):
    """Receives the statistics of each forward pass of its layer. No tensor of an observation carries a gradient."""

    def observe(self, seen: Observation) -> None: ...


@torch.no_grad()
def router_stats(routing: Routing, bias_E: Tensor) -> RouterStats:
    """Return the statistics of a routing; `bias_E` is the bias that the routing was made with."""
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
    """Return the sums and maxima over the rows of each expert."""
    # A choice elsewhere marks a row that belongs to no group.
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
    table_FP.masked_fill_(~real_P, 0.0)
    # The rows that belong to no group come last.
    sizes_S = torch.cat([plan.groups_E, (len(real_P) - plan.groups_E.sum())[None]])
    sums_FE = _segments(table_FP[:-2], "sum", sizes_S)
    peaks_FE = _segments(table_FP[-2:], "max", sizes_S)
    return ExpertStats(plan.counts_E.to(sums_FE.dtype), *sums_FE.unbind(0), *peaks_FE.unbind(0))


@torch.no_grad()
def shared_stats(gate: Tensor, up: Tensor, limit: float | None) -> SharedStats:
    """Return the statistics of the shared expert from its gate and up [..., I] before clipping."""
    gate, up = gate.detach(), up.detach()
    # Use half of `aminmax`: on a CPU it takes half the time of `amax`.
    peak_gate, peak_up = F.silu(gate.aminmax().max.float()).clamp_(min=0), _peak(up)
    clipped = peak_gate.new_zeros(())
    # On a CPU, reading the peaks costs nothing and usually shows that nothing was clipped. On a GPU it would wait.
    if limit is not None and (gate.device.type != "cpu" or torch.maximum(peak_gate, peak_up) > limit):
        clipped = count_clipped(gate, up, limit).sum().float()
    return SharedStats(clipped, peak_gate, peak_up)


@torch.no_grad()
def out_norms(result_PD: Tensor, weights_P: Tensor) -> Tensor:
    """Return the norm of each row of the result without the weight of its choice [P]; 0 where that is 0."""
    norm_P = torch.linalg.vector_norm(result_PD, dim=1, dtype=weights_P.dtype)
    return torch.where(weights_P > 0, norm_P / weights_P, 0.0)


@torch.no_grad()
def sums_of_norms(routed_ND: Tensor, shared_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the norms of the rows of both results. Norms have the dtype of the values; their sum is at
    least fp32."""
    norms = [torch.linalg.vector_norm(values_ND.detach(), dim=1) for values_ND in (routed_ND, shared_ND)]
    routed, shared = (norms_N.to(torch.promote_types(norms_N.dtype, torch.float32)).sum() for norms_N in norms)
    return routed, shared


def count_clipped(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """Return how many elements the limit clips in each row; gate and up count separately."""
    return (F.silu(gate) > limit).sum(dim=-1) + (up.abs() > limit).sum(dim=-1)


def _peak(values: Tensor) -> Tensor:
    """Return max |values|, in one pass and without a copy."""
    low, high = torch.aminmax(values.detach())
    return torch.maximum(-low, high).float()


def _segments(table_FP: Tensor, reduce: str, sizes_S: Tensor) -> Tensor:
    """Reduce each column over consecutive rows, `sizes_S` of them at a time, and leave out the last of these: [F, S−1].

    The rows are reduced in order and without atomics, so that the sums are reproducible.
    """
    columns = len(table_FP)
    # Treat the table as one long row: the segments of each column, one after the other.
    sizes = sizes_S.repeat(columns)
    reduced = torch.segment_reduce(table_FP.flatten(), reduce, lengths=sizes, axis=0, unsafe=True, initial=0.0)
    return reduced.view(columns, -1)[:, :-1]
