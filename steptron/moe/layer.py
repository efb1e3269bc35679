"""The MoE layer: router, routed experts and shared expert.

    y = Σ_k weight_k · expert_k(x) + shared(x)

Tokens travel while the shared expert computes: to their experts beside its first two products, back beside its last.
Autograd runs the same order backwards, so that gradients travel beside its products too.

    dispatch starts ─ gate, up of the shared expert ─ dispatch ends ─ experts ─ combine starts ─ down ─ combine ends

In training, the layer counts the tokens of each expert, the passes whose logits were not finite, and the choices that
did not fit into buffers of a fixed capacity. Once per step, `take_counts`, `take_broken` and `take_overflow` return the
sums.

Legend: B rows, T tokens, D hidden, N = B·T, E experts.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from steptron.config.schema import BalanceConfig, MoeConfig
from steptron.moe.balance import balance_loss
from steptron.moe.dispatch import Dispatcher, LocalDispatcher, count_tokens
from steptron.moe.elementwise import TORCH
from steptron.moe.experts import Experts
from steptron.moe.router import Router, Routing
from steptron.moe.stats import ExpertStats, MoeObserver, Observation, SharedStats
from steptron.nn.mlp import GatedMLP
from steptron.nn.recompute import recomputing


class Computed(NamedTuple):
    """The results of all experts for the tokens of this rank."""

    routed_ND: Tensor
    """Σ_k weight_k · expert_k(x), on whichever ranks the experts are."""
    shared_ND: Tensor
    """The result of the shared expert."""
    experts: ExpertStats | None
    """Statistics of this rank's experts, if they were asked for."""
    shared: SharedStats | None
    """Statistics of the shared expert, if they were asked for."""


class MoeLayer(nn.Module):
    """Routed experts plus a shared one.

    The stage sets `balance`, `experts.limit`, `shared.limit` and `router.frozen`.
    """

    def __init__(self, hidden_size: int, config: MoeConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.router = Router(hidden_size, config)
        self.experts = Experts(config.num_experts, hidden_size, config.ffn_size)
        self.shared = GatedMLP(hidden_size, config.shared_ffn_size)
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.observer: MoeObserver | None = None
        self.kernels = TORCH
        """The small operations of the layer; set from outside for the device."""
        self.row_group: ProcessGroup | None = None
        """Ranks that hold pieces of the same batch rows; None if this rank holds complete rows."""
        self.capacity: float | None = None
        """The capacity of the dispatcher's buffers in training (see `Dispatcher.dispatch`); None: exact sizes."""
        self.balance = BalanceConfig()
        self._counts_E: Tensor | None = None
        self._broken: Tensor | None = None
        self._overflow: Tensor | None = None

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return (y_BTD, this rank's share of the balance losses: a scalar).

        The losses are multiplied by their coefficients and summed over the batch rows.
        """
        x_ND = x_BTD.flatten(0, 1)
        routing = self.router(x_ND)
        counts_E = count_tokens(routing.experts_NK, self.num_experts)
        again = recomputing()
        if self.training and not again:
            self._count(counts_E, routing)
        if self.observer is None or again or not self.training:
            computed = self.compute(x_ND, routing.experts_NK, routing.weights_NK)
            y_ND = computed.routed_ND + computed.shared_ND
        else:
            y_ND = self._observed(self.observer, x_ND, routing, counts_E)
        return y_ND.view_as(x_BTD), balance_loss(routing, self.balance, x_BTD.shape[0], self.row_group)

    def compute(self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor, with_stats: bool = False) -> Computed:
        """Return the results of routed and shared experts, each [N, D]."""
        again = recomputing()
        arriving = self.dispatcher.dispatch(x_ND, experts_NK, weights_NK, self.capacity if self.training else None)
        made: list[Any] = []

        def run_experts(gate: Tensor, up: Tensor) -> None:
            here = arriving()
            if here.overflow is not None and not again:
                self._overflow = here.overflow if self._overflow is None else self._overflow + here.overflow
            y_ND, stats = self.experts(here, with_stats)
            coming_back = self.dispatcher.combine(y_ND, here.way_back)
            watched = with_stats and not again
            shared = self.kernels.shared_stats(gate, up, self.shared.limit) if watched else None
            made.extend((coming_back, stats, shared))

        shared_ND = self.shared(x_ND, run_experts)
        coming_back, experts, shared = made
        return Computed(coming_back(), shared_ND, experts, shared)

    def take_counts(self) -> Tensor:
        """Return the tokens of each expert [E] since the last call, and reset the count."""
        counts_E, self._counts_E = self._counts_E, None
        return self._zeros(self.num_experts) if counts_E is None else counts_E

    def take_broken(self) -> Tensor:
        """Return the forward passes with NaN or infinity in the router's logits since the last call (int64 scalar)."""
        broken, self._broken = self._broken, None
        return self._zeros() if broken is None else broken

    def take_overflow(self) -> Tensor:
        """Return the choices that did not fit, and were left out, since the last call (int64 scalar)."""
        overflow, self._overflow = self._overflow, None
        return self._zeros() if overflow is None else overflow

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self.router.bias.device)

    def _count(self, counts_E: Tensor, routing: Routing) -> None:
        # The sum is finite if all logits are, and only then minus itself 0. Finite logits whose sum overflows are just
        # as bad.
        total = routing.logits_NE.detach().sum()
        broken = (total - total != 0).long()
        self._counts_E = counts_E if self._counts_E is None else self._counts_E + counts_E
        self._broken = broken if self._broken is None else self._broken + broken

    def _observed(self, observer: MoeObserver, x_ND: Tensor, routing: Routing, counts_E: Tensor) -> Tensor:
        """Return routed experts plus shared expert, and give the statistics of both to the observer."""
        routed_ND, shared_ND, experts, shared = self.compute(x_ND, routing.experts_NK, routing.weights_NK, True)
        assert experts is not None, "the experts were asked for statistics"
        assert shared is not None, "the shared expert was asked for statistics"
        routed_norm, shared_norm = self.kernels.sums_of_norms(routed_ND, shared_ND)
        seen = Observation(
            routing=Routing(*(t.detach() for t in routing)),
            counts_E=counts_E,
            router=self.kernels.router_stats(routing, self.router.bias),
            experts=experts,
            shared=shared,
            routed_norm=routed_norm,
            shared_norm=shared_norm,
        )
        observer.observe(seen)
        return routed_ND + shared_ND
