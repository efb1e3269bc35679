"""The MoE layer: router, routed experts, shared expert.

    y = Σ_k weight_k · expert_k(x) + shared(x)

While training it counts the tokens of each expert; `take_counts` hands the sum over, once a step, to whoever updates the router's bias.

Legend: B rows, T tokens, D hidden, N = B·T, E experts.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from steptron.config.schema import MoeConfig
from steptron.moe.balance import ep_group_loss
from steptron.moe.dispatch import Dispatcher, LocalDispatcher, count_tokens
from steptron.moe.experts import Experts
from steptron.moe.router import Router, Routing
from steptron.nn.mlp import GatedMLP


class MoeObserver(Protocol):
    """Sees the routing of each forward pass of the layer that it is hung on."""

    def observe(self, routing: Routing, counts_E: Tensor) -> None: ...


class MoeLayer(nn.Module):
    """Routed experts and a shared one. What the stage sets: `num_groups`, `with_ep_loss`, `experts.limit`, `shared.limit`."""

    def __init__(self, hidden_size: int, config: MoeConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.router = Router(hidden_size, config.num_experts, config.top_k, config.scaling_factor)
        self.experts = Experts(config.num_experts, hidden_size, config.ffn_size)
        self.shared = GatedMLP(hidden_size, config.shared_ffn_size)
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.observer: MoeObserver | None = None
        self.row_group: ProcessGroup | None = None
        """Ranks that hold pieces of the same batch rows; None: rows are whole."""
        self.num_groups = 1
        self.with_ep_loss = False
        self._counts_E: Tensor | None = None

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """(y_BTD, this rank's share of the EP-group loss summed over the batch rows: a scalar, 0 when it is off)."""
        x_ND = x_BTD.flatten(0, 1)
        routing = self.router(x_ND)
        counts_E = count_tokens(routing.experts_NK, self.num_experts)
        if self.training and not _recomputing():
            self._counts_E = counts_E if self._counts_E is None else self._counts_E + counts_E
        if self.observer is not None:
            self.observer.observe(routing, counts_E)
        y_ND = self.routed(x_ND, routing.experts_NK, routing.weights_NK) + self.shared(x_ND)
        if self.with_ep_loss:
            loss = ep_group_loss(
                routing.probabilities_NE, routing.experts_NK, x_BTD.shape[0], self.num_groups, self.row_group
            )
        else:
            loss = routing.probabilities_NE.new_zeros(())
        return y_ND.view_as(x_BTD), loss

    def routed(self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Σ_k weight_k · expert_k(x) [N, D], wherever the experts are."""
        here = self.dispatcher.dispatch(x_ND, experts_NK, weights_NK)
        y_ND = self.experts(here.x_ND, here.experts_NK, here.weights_NK)
        return self.dispatcher.combine(y_ND, here.way_back)

    def take_counts(self) -> Tensor:
        """Tokens by expert [E] since the last call; starts again from zero."""
        counts_E, self._counts_E = self._counts_E, None
        if counts_E is None:
            counts_E = torch.zeros(self.num_experts, dtype=torch.int64, device=self.router.bias.device)
        return counts_E


def _recomputing() -> bool:
    """Whether autograd is running: then activation checkpointing repeats a forward pass whose tokens are counted already."""
    return torch._C._current_graph_task_id() != -1
