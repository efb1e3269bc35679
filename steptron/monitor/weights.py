"""What is seen of parameters and gradients after a backward pass, from this rank's shards.

    gradient squares (made for the global norm) ─► by parameter · which are not finite, by rank
    expert matrices ─► Frobenius norm by expert          all parameters ─► norm by parameter        q and k norms ─► gains by layer

Each element counts once over all ranks: a shard that several ranks hold is divided among them.

Legend: P parameters of this rank, E experts, I expert FFN, D hidden.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from steptron.model.transformer import Transformer
from steptron.monitor import plane as names
from steptron.monitor.plane import Plane
from steptron.monitor.probes import blocks_of, sum_of_squares
from steptron.nn.local import local
from steptron.nn.rectangles import rectangle

EXPERT_MATRICES = ("w_gate", "w_up", "w_down")


class ExpertWeights:
    """Writes the squares of each expert's matrices, a vital statistic."""

    def __init__(self, models: Iterable[Transformer], plane: Plane, copies: Mapping[str, int]):
        self._layers = [
            (row, [(moe.experts.get_parameter(w), copies[f"layers.{n}.moe.experts.{w}"]) for w in EXPERT_MATRICES])
            for model in models
            for n, moe in model.moe_layers().items()
            for row in [plane.registry.grid_of("tokens")[0].values.index(n)]
        ]
        self._sums_LE = plane.view("weight_square_sum") if self._layers else None

    @torch.no_grad()
    def see(self) -> None:
        """Add them up as they are now."""
        for row, matrices in self._layers:
            assert self._sums_LE is not None, "layers with experts have statistics by expert"
            for parameter, copies in matrices:
                part = local(parameter)
                if part.numel():
                    experts = rectangle(parameter).slices[0]
                    squares_E = torch.linalg.vector_norm(part, dim=-1).square().sum(dim=1)
                    self._sums_LE[row, experts] += squares_E / copies


class AllWeights:
    """Writes norms of gradients, of parameters, and of gains."""

    def __init__(
        self, models: Iterable[Transformer], plane: Plane, parameters: Mapping[str, Tensor], copies: Mapping[str, int]
    ):
        self._plane, self._parameters = plane, list(parameters.values())
        copies_P = [copies[name] for name in parameters]
        self._copies_P = torch.tensor(copies_P, dtype=torch.float64, device=plane.values.device)
        rows = {n: row for row, n in enumerate(plane.registry.grid_of("q_gain")[0].values)}
        sums_SL = plane.view(*names.GAIN_SUMS)
        self._gains = [
            (sums_SL[:, rows[n]], block.attention, copies[f"{path}.attention.q_norm.weight"])
            for model in models
            for n, (path, block) in blocks_of(model).items()
        ]

    @torch.no_grad()
    def see(self, squares_P: Tensor) -> None:
        """Add them up as they are now; `squares_P` are those of the gradients."""
        self._plane.view("gradient_square_sum").add_(squares_P)
        own_P = torch.stack([sum_of_squares(local(p)) for p in self._parameters])
        self._plane.view("parameter_square_sum").add_(own_P / self._copies_P)
        for sums_S, attention, copies in self._gains:
            q, k = (1 + local(norm.weight).float() for norm in (attention.q_norm, attention.k_norm))
            sums_S += torch.stack([q.square().sum(), k.square().sum(), q.new_full((), q.numel())]) / copies
