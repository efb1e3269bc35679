"""Writers of the plane during a step: observers that modules call, and hooks that are attached from outside.

    MoE layers ────── observer ──────────► router, experts, shared expert
    attention ─────── kernel, gate hook ─► gate mean, entropy by head
    blocks ────────── hook ──────────────► residual stream by layer
    output matrices ─ observer ──────────► loss by source, position, head
    modules named by the recipe ─ hook ──► their output

Every value is a sum or a maximum, written without a host sync. Passes that the backward pass repeats are skipped, and
so are passes of a network that is not in training mode.

Legend: N tokens, D hidden, H query heads here, K KV heads, A head_dim, M keys, E experts, L layers.
"""

import difflib
import fnmatch
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from steptron.model.block import Block
from steptron.model.inputs import Inputs
from steptron.model.transformer import Transformer
from steptron.moe.stats import Observation
from steptron.monitor.statistics import plane as names
from steptron.monitor.statistics.plane import Plane, raise_to
from steptron.monitor.statistics.reduced_stats import EXPERT_SUMS, ROUTER_SUMS
from steptron.nn.attention import Attention
from steptron.nn.packing import Packing
from steptron.nn.recompute import recomputing

SAMPLED = 2
"""The number of matrices of a stack whose orthogonality is measured in a step."""

log = logging.getLogger("steptron")


def blocks_of(model: Transformer) -> dict[int, tuple[str, Block]]:
    """Return name and module of every block of a part, by layer.

    The blocks of MTP heads are numbered after those of the backbone.
    """
    numbers = {f"mtp.{h}.block": model.config.num_layers + h for h in range(model.config.num_mtp_heads)}
    numbers |= {f"layers.{n}": n for n in model.blocks()}
    return {numbers[name]: (name, block) for name, block in model.all_blocks().items()}


class VitalMoeProbe:
    """Writes the statistics of one MoE layer that detectors need."""

    def __init__(self, plane: Plane, row: int, experts: range, columns: int):
        """Prepare the probe.

        `row` is the position of the layer among all MoE layers, `experts` are those of this rank, and `columns` is the
        number of FFN columns that this rank has of each.
        """
        self._tokens_E = plane.view("tokens")[row]
        self._router_S = plane.view(*ROUTER_SUMS)[:, row]
        self._experts_SE = plane.view(*EXPERT_SUMS)[:, row, experts.start : experts.stop]
        self._columns = columns

    def observe(self, seen: Observation) -> None:
        """Add one forward pass."""
        router, experts = seen.router, seen.experts
        self._tokens_E += seen.counts_E
        tokens = torch.full_like(router.entropy, router.tokens)
        self._router_S += torch.stack([tokens, router.confidence, router.entropy, router.margin])
        self._experts_SE += torch.stack(
            [experts.rows, experts.rows * self._columns, experts.h_square, experts.out_norm]
        )


class FullMoeProbe(VitalMoeProbe):
    """Writes all statistics of one MoE layer."""

    def __init__(self, plane: Plane, row: int, experts: range, columns: int, row_here: int):
        """Prepare the probe; `row_here` is the position of the layer among the MoE layers of this rank."""
        super().__init__(plane, row, experts, columns)
        self._swiglu_SE = plane.view(*names.SWIGLU_SUMS)[:, row_here]
        self._peaks_SE = plane.view(*names.EXPERT_PEAKS)[:, row_here]
        self._mass_E = plane.view("mass_sum")[row_here]
        self._layer_S = plane.view(*names.LAYER_SUMS)[:, row_here]
        self._layer_peaks_S = plane.view(*names.LAYER_PEAKS)[:, row_here]

    def observe(self, seen: Observation) -> None:
        """Add one forward pass."""
        super().observe(seen)
        experts, shared = seen.experts, seen.shared
        self._swiglu_SE += torch.stack([experts.gate_up, experts.gate_square, experts.up_square, experts.clipped])
        raise_to(self._peaks_SE, torch.stack([experts.peak_gate, experts.peak_up]))
        self._mass_E += seen.router.mass_E
        self._layer_S += torch.stack([shared.clipped, seen.routed_norm, seen.shared_norm])
        raise_to(self._layer_peaks_S, torch.stack([seen.router.logit_max, shared.peak_gate, shared.peak_up]))


@dataclass(kw_only=True)
class Batches:
    """The micro-batch that a model is working on, for hooks that see only a part of it."""

    inputs: Inputs | None = None

    def follow(self, model: Transformer) -> None:
        """Update it at each forward pass of the model from now on."""

        def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self.inputs = kwargs["inputs"]

        model.register_forward_pre_hook(note, with_kwargs=True)


def watch_experts(models: Iterable[Transformer], plane: Plane, experts: range, columns: int, full: bool) -> None:
    """Attach an observer to every MoE layer. This rank computes `columns` of the FFN of each of `experts`."""
    layers = {n: moe for model in models for n, moe in model.moe_layers().items()}
    if not layers:
        return
    rows = {n: row for row, n in enumerate(plane.registry.grid_of("tokens")[0].values)}
    for row_here, (n, moe) in enumerate(layers.items()):
        if full:
            moe.observer = FullMoeProbe(plane, rows[n], experts, columns, row_here)
        else:
            moe.observer = VitalMoeProbe(plane, rows[n], experts, columns)


def watch_layers(models: Iterable[Transformer], plane: Plane, tp_rank: int) -> None:
    """Attach probes for the residual stream, gates and attention entropy of every layer.

    `tp_rank` determines which heads are on this rank.
    """
    for model in models:
        rows = _rows_of_layers(plane) if model.all_blocks() else {}
        for n, (_, block) in blocks_of(model).items():
            if block.mlp is not None or block.moe is not None:  # not behind the attention of a layer on two stages
                _watch_residual(block, plane, rows[n])
            if block.attention is not None:
                _watch_attention(block.attention, plane, rows[n], tp_rank)


def _rows_of_layers(plane: Plane) -> dict[int, int]:
    return {int(n): row for row, n in enumerate(plane.registry.grid_of("residual_rms")[0].values)}


def _watch_residual(block: Block, plane: Plane, row: int) -> None:
    sums_S, peak = plane.view(*names.RESIDUAL_SUMS)[:, row], plane.view("residual_max")[row]
    block.register_forward_hook(_hook(lambda output: _size(output[0], sums_S, peak)))


def _watch_attention(attention: Attention, plane: Plane, row: int, tp_rank: int) -> None:
    sums_SH = plane.view(*names.HEAD_SUMS)[:, row]
    kernel = attention.kernel

    def see_gate(gate_NH: Tensor) -> None:
        mine_SH = _heads_here(sums_SH, gate_NH.shape[1], tp_rank)
        mine_SH[0] += gate_NH.float().sigmoid().sum(dim=0)
        mine_SH[1] += gate_NH.shape[0]

    def see_entropy(q_NHA: Tensor, k_NKA: Tensor, v_NKA: Tensor, packing: Packing) -> Tensor:
        seen = attention.training and not recomputing()
        if seen and (span := _longest_here(packing)) is not None:
            mine_SH = _heads_here(sums_SH, q_NHA.shape[1], tp_rank)
            mine_SH[2] += last_query_entropy(q_NHA.detach(), k_NKA.detach(), span, attention.window)
            mine_SH[3] += 1
        return kernel(q_NHA, k_NKA, v_NKA, packing)

    attention.gate_proj.register_forward_hook(_hook(see_gate))
    attention.kernel = _as_it_is(see_entropy)


def _heads_here(sums_SH: Tensor, heads: int, tp_rank: int) -> Tensor:
    return sums_SH[:, tp_rank * heads : (tp_rank + 1) * heads]


def _as_it_is(function: Callable[..., Any]) -> Any:
    """Exclude the function from the compilation of the layer that calls it."""
    return torch.compiler.disable(function)


@torch.no_grad()
def last_query_entropy(q_NHA: Tensor, k_NKA: Tensor, span: tuple[int, int], window: int | None) -> Tensor:
    """Return the entropy (nats) of the attention of the last token of the document at `span`, by head [H]."""
    start, stop = span
    if window is not None:
        start = max(start, stop - window)
    # In fp32: on a CPU, a bf16 product this small takes twice as long.
    q_KGA = q_NHA[stop - 1].unflatten(0, (k_NKA.shape[1], -1)).float()
    scores_KGM = q_KGA @ k_NKA[start:stop].float().permute(1, 2, 0) * q_NHA.shape[-1] ** -0.5
    return torch.special.entr(scores_KGM.softmax(dim=-1)).sum(dim=-1).flatten()


def _longest_here(packing: Packing) -> tuple[int, int] | None:
    """Return the longest document that is complete and contiguous on this rank, as a range of its tokens.

    Returns None if there is none.
    """
    tokens_here = sum(stop - start for start, stop in packing.pieces)
    best = None
    for row in range(packing.rows):
        base = row * tokens_here
        for start, stop in packing.pieces:
            shift = base - start
            first, last = row * packing.row_length + start, row * packing.row_length + stop
            for a, b in _inside(packing.cu_seqlens, first, last):
                a, b = a - row * packing.row_length + shift, b - row * packing.row_length + shift
                if best is None or b - a > best[1] - best[0]:
                    best = (a, b)
            base += stop - start
    return best


def _inside(borders: tuple[int, ...], first: int, last: int) -> Iterable[tuple[int, int]]:
    return ((a, b) for a, b in pairwise(borders) if a >= first and b <= last)


def watch_losses(models: Iterable[Transformer], plane: Plane, batches: Batches, tp: int) -> None:
    """Attach probes for the loss by source, position and MTP head.

    `tp` ranks compute the same losses; each of them counts its share.
    """
    for model in models:
        for h, head in model.output_heads().items():
            head.observer = _HeadLosses(plane, h - 1, 1 / tp) if h else _MainLosses(plane, batches, 1 / tp)


class _MainLosses:
    """Next-token losses, by source and by position in the document."""

    def __init__(self, plane: Plane, batches: Batches, share: float):
        self._plane, self._batches, self._share = plane, batches, share
        starts = plane.registry.grid_of("position_loss")[0].values
        self._borders = torch.tensor(starts[1:], dtype=torch.int64, device=plane.values.device)

    def observe(self, losses_N: Tensor, weights_N: Tensor) -> None:
        """Add one micro-batch."""
        inputs = self._batches.inputs
        assert inputs is not None, "losses follow a forward pass"
        sums_NS = torch.stack([losses_N.float(), weights_N], dim=1) * self._share
        positions_BT = inputs.packing.positions_BT
        buckets_N = torch.bucketize(positions_BT.flatten(), self._borders, right=True)
        self._add("position", buckets_N, sums_NS)
        self._add("source", inputs.sources_B.repeat_interleave(positions_BT.shape[1]), sums_NS)

    def _add(self, prefix: str, cells_N: Tensor, sums_NS: Tensor) -> None:
        cells_SC = self._plane.view(f"{prefix}_loss_sum", f"{prefix}_targets")
        one_hot_CN = (torch.arange(cells_SC.shape[1], device=cells_N.device)[:, None] == cells_N).float()
        cells_SC += (one_hot_CN @ sums_NS).T  # not index_add: its order is not fixed on CUDA


class _HeadLosses:
    """Losses of one MTP head."""

    def __init__(self, plane: Plane, head: int, share: float):
        self._sums_S, self._share = plane.view("mtp_loss_sum", "mtp_targets")[:, head], share

    def observe(self, losses_N: Tensor, weights_N: Tensor) -> None:
        """Add one micro-batch."""
        self._sums_S += torch.stack([losses_N.float().sum(), weights_N.sum()]) * self._share


def matching(patterns: Sequence[str], models: Iterable[Transformer]) -> tuple[list[str], list[str]]:
    """Return the modules that the recipe's patterns match, in the model's order, and the patterns without a match."""
    known = list(dict.fromkeys(name for model in models for name, _ in model.named_modules() if name))
    hits = {pattern: set(fnmatch.filter(known, pattern)) for pattern in patterns}
    found = set().union(*hits.values())
    return [name for name in known if name in found], [pattern for pattern in patterns if not hits[pattern]]


def warn_of_patterns(patterns: Iterable[str], models: Iterable[Transformer]) -> None:
    """Warn of patterns that match no module, with the nearest names."""
    known = [name for model in models for name, _ in model.named_modules() if name]
    for pattern in patterns:
        near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3)
        log.warning("monitor.probes: no module is called %s; near: %s", pattern, ", ".join(near) or "none")


def watch_modules(models: Iterable[Transformer], plane: Plane) -> None:
    """Attach probes for the size of the outputs of the modules in the registry."""
    if "output_rms" not in plane.registry.derived:
        return
    modules: Mapping[str, nn.Module] = {name: m for model in models for name, m in model.named_modules()}
    sums_SM, peaks_M = plane.view("output_square_sum", "output_elements"), plane.view("output_max")
    for row, name in enumerate(plane.registry.grid_of("output_rms")[0].values):
        sums_S, peak = sums_SM[:, row], peaks_M[row]
        modules[str(name)].register_forward_hook(
            _hook(lambda output, sums_S=sums_S, peak=peak: _size(_first_tensor(output), sums_S, peak))
        )


def _first_tensor(output: Any) -> Tensor | None:
    values = output if isinstance(output, tuple | list) else (output,)
    return next((value for value in values if isinstance(value, Tensor) and value.is_floating_point()), None)


def _size(values: Tensor | None, sums_S: Tensor, peak: Tensor) -> None:
    """Add Σ x² and the number of elements to `sums_S`, and raise `peak` to max |x|.

    Experts without tokens have an empty output, which adds nothing.
    """
    if values is None or not values.numel():
        return
    sums_S[0] += sum_of_squares(values)
    sums_S[1] += values.numel()
    low, high = torch.aminmax(values)
    raise_to(peak, torch.maximum(-low, high).float())


def _hook(see: Callable[[Any], None]) -> Callable[..., None]:
    """Return a forward hook that calls `see` with a module's output, without gradients, once per pass.

    A compiled layer calls it uncompiled.
    """

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if module.training and not recomputing():
            with torch.no_grad():
                see(output)

    return _as_it_is(hook)


class UpdateProbe:
    """Writes the size of the parameters' changes, and the orthogonality of Muon's updates."""

    def __init__(self, plane: Plane, copies: Mapping[str, int]):
        """Prepare the probe; `copies` gives, for each parameter, the number of ranks that hold the same elements."""
        self._sums_SP = plane.view(*names.UPDATE_SUMS)
        self._rows = {name: row for row, name in enumerate(plane.registry.grid_of("gradient_norm")[0].values)}
        self._copies = copies

    @torch.no_grad()
    def updated(self, name: str, change: Tensor, scale: float) -> None:
        """Add a piece of a parameter."""
        self._sums_SP[0, self._rows[name]] += sum_of_squares(change) * (scale**2 / self._copies[name])

    @torch.no_grad()
    def orthogonalised(self, names: Sequence[str], y_MRC: Tensor) -> None:
        """Add |Y·Yᵀ − 1|² ÷ rows of a few matrices of each parameter, estimated without computing the product.

        For a vector v of random signs, E|(Y·Yᵀ − 1)·v|² is the squared Frobenius norm (Hutchinson's estimator). For a
        tall matrix, Yᵀ·Y is used.
        """
        wide_MRC = y_MRC if y_MRC.shape[1] <= y_MRC.shape[2] else y_MRC.mT
        signs_R = _signs(wide_MRC)
        for name, group in groupby(range(len(names)), key=lambda i: names[i]):
            places = _few(list(group))
            # One matrix at a time, in its memory layout: batched products with one vector are several times slower on a
            # CPU.
            squares_M = torch.stack([_off_orthogonal(wide_MRC[place], signs_R) for place in places])
            self._sums_SP[1, self._rows[name]] += squares_M.sum()
            self._sums_SP[2, self._rows[name]] += len(places)


def _few(places: list[int]) -> list[int]:
    """Return at most `SAMPLED` of the positions, evenly spread."""
    count = min(len(places), SAMPLED)
    return [places[i * len(places) // count] for i in range(count)]


def _off_orthogonal(wide_RC: Tensor, signs_R: Tensor) -> Tensor:
    """Return |(Y·Yᵀ − 1)·v|² ÷ rows for one matrix."""
    return (torch.mv(wide_RC, torch.mv(wide_RC.T, signs_R)) - signs_R).float().square().mean()


def _signs(wide_MRC: Tensor) -> Tensor:
    """Return +1 or −1 by row, from the bits of a multiplicative hash.

    The signs have no pattern that a matrix could share.
    """
    rows_R = torch.arange(wide_MRC.shape[1], device=wide_MRC.device)
    return (((rows_R * 2654435761) >> 13) % 2 * 2 - 1).to(wide_MRC.dtype)


def sum_of_squares(values: Tensor) -> Tensor:
    """Return Σ x², a scalar: norms of rows are rounded to the values' dtype; their squares and the sum are fp64."""
    if values.ndim > 1 and values.stride(-1) != 1:
        values = values.mT  # rows in memory order: Muon's change of a tall matrix is transposed
    rows = values.flatten(0, -2) if values.ndim > 1 else values
    return torch.linalg.vector_norm(rows, dim=-1).double().square().sum()
