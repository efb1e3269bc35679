"""Statistics of parameters and gradients after a backward pass, from this rank's shards.

    gradient squares (computed for the global norm) ─► by parameter · number of non-finite ones, by rank
    expert matrices ─► Frobenius norm by expert
    all parameters ──► norm by parameter
    q and k norms ───► gains by layer

Each element counts once over all ranks: a shard that several ranks hold is divided among them.

Legend: P parameters of this rank, E experts, I expert FFN, D hidden.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from steptron.model.transformer import Transformer
from steptron.monitor.statistics import plane as names
from steptron.monitor.statistics.plane import Plane
from steptron.monitor.statistics.probes import blocks_of, sum_of_squares
from steptron.nn.shard_geometry import rectangle
from steptron.nn.to_local import local

EXPERT_MATRICES = ("w_gate", "w_up", "w_down")


class ExpertWeights:
    """Writes the squares of each expert's matrices, a vital statistic."""

    def __init__(
        self, models: Iterable[Transformer], plane: Plane, parameters: Mapping[str, Tensor], copies: Mapping[str, int]
    ):
        self._layers = [
            (row, moe.num_experts, [(name, parameters[name], copies[name]) for name in _matrices_of(n)])
            for model in models
            for n, moe in model.moe_layers().items()
            for row in [plane.registry.grid_of("tokens")[0].values.index(n)]
        ]
        self._sums_LE = plane.view("weight_square_sum") if self._layers else None

    @torch.no_grad()
    def see(self) -> dict[str, Tensor]:
        """Add the current squares to the plane. Return Σ p² of this rank's part of each parameter, float64 scalars."""
        squares = {}
        for row, num_experts, matrices in self._layers:
            assert self._sums_LE is not None, "layers with experts have statistics by expert"
            for name, parameter, copies in matrices:
                if local(parameter).numel():
                    experts, squares_E = _squares_by_expert(parameter, num_experts)
                    self._sums_LE[row, experts] += squares_E / copies
                    squares[name] = squares_E.double().sum()
        return squares


def _matrices_of(layer: int) -> list[str]:
    return [f"layers.{layer}.moe.experts.{w}" for w in EXPERT_MATRICES]


def _squares_by_expert(parameter: Tensor, num_experts: int) -> tuple[slice, Tensor]:
    """Return the experts of which this rank holds a part of a stack [E, I, D], and the sum of squares of each part."""
    part, mine = local(parameter), rectangle(parameter)
    if part.ndim > 1:
        return mine.slices[0], torch.linalg.vector_norm(part, dim=-1).square().sum(dim=1)
    # A stack that is stored flat may be cut anywhere: pad it to complete experts with zeros.
    each = parameter.numel() // num_experts
    start, stop = mine.slices[0].start, mine.slices[0].stop
    first, last = start // each, -(-stop // each)
    rows_E = F.pad(part, (start - first * each, last * each - stop)).view(last - first, each)
    return slice(first, last), torch.linalg.vector_norm(rows_E, dim=1).square()


class AllWeights:
    """Writes norms of gradients, of parameters, and of gains."""

    def __init__(
        self, models: Iterable[Transformer], plane: Plane, parameters: Mapping[str, Tensor], copies: Mapping[str, int]
    ):
        self._plane, self._parameters = plane, parameters
        copies_P = [copies[name] for name in parameters]
        self._copies_P = torch.tensor(copies_P, dtype=torch.float64, device=plane.values.device)
        with_attention = {
            n: path for model in models for n, (path, block) in blocks_of(model).items() if block.attention is not None
        }
        rows = list(plane.registry.grid_of("q_gain")[0].values) if with_attention else []
        self._gains = [
            (
                plane.view(*names.GAIN_SUMS)[:, rows.index(n)],
                [parameters[f"{path}.attention.{norm}.weight"] for norm in ("q_norm", "k_norm")],
                copies[f"{path}.attention.q_norm.weight"],
            )
            for n, path in with_attention.items()
        ]

    @torch.no_grad()
    def see(self, squares_P: Tensor, known: Mapping[str, Tensor]) -> None:
        """Add the current norms to the plane.

        `squares_P` are Σ g² of this rank's part of each parameter; `known` are those Σ p² that are already computed.
        """
        self._plane.view("gradient_square_sum").add_(squares_P)
        own_P = torch.stack([known[n] if n in known else sum_of_squares(local(p)) for n, p in self._parameters.items()])
        self._plane.view("parameter_square_sum").add_(own_P / self._copies_P)
        for sums_S, norms, copies in self._gains:
            q, k = (1 + local(norm).float() for norm in norms)
            sums_S += torch.stack([q.square().sum(), k.square().sum(), q.new_full((), q.numel())]) / copies
