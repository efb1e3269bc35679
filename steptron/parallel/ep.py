"""Expert parallel: routed experts over ranks (ep, etp); tokens travel by all-to-all, or all-gather and reduce-scatter.

The group of a dispatcher is (ep, etp) of the expert view, flattened: rank e · etp + t holds the e-th group of
consecutive experts, and of each expert the t-th FFN columns. Every rank brings its own tokens.

    x_ND ─ one row per rank with a chosen expert ─→ all-to-all ─→ experts ─→ all-to-all ─→ Σ of a token's rows ─→ y_ND
    x_ND ─ all-gather ─→ experts of each rank on all tokens ─→ reduce-scatter ─→ y_ND

A token is sent to a rank once, however many of its experts are there; with etp > 1, it is sent to all ranks that hold
columns of them. Ranks return partial sums over their experts or columns, which add up to the result.

Legend: N tokens, D hidden, K choices a token, R groups of experts (ep), W ranks of the group, S rows sent (a row: token
and rank).
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from steptron.moe.dispatch import ELSEWHERE, Dispatched, ExpertRows, gather_rows, ragged_rows, sum_rows
from steptron.moe.layer import MoeLayer
from steptron.torch_internals import flatten_mesh, functional, start_all_gather, start_all_to_all, start_reduce_scatter

PLACEMENTS = {
    "w_gate": (Shard(0), Shard(1)),
    "w_up": (Shard(0), Shard(1)),
    "w_down": (Shard(0), Shard(2)),
}
"""Split of the experts' parameters over (ep, etp): by expert, and by FFN column of each expert."""


class WayBack(NamedTuple):
    """The data that `combine` needs to return the rows of a dispatch."""

    rows: ExpertRows
    """The rows that were sent, and their tokens."""
    sent: list[int]
    """Number of rows sent to each rank of the group."""
    received: list[int]
    """Number of rows received from each rank of the group."""


class AllToAllDispatcher:
    """Sends each token to the ranks that hold one of its chosen experts, and to no other rank."""

    def __init__(self, group: ProcessGroup, ep: int, etp: int, num_experts: int) -> None:
        self.group, self.ep, self.etp = group, ep, etp
        self.group_size = _experts_per_group(group, ep, etp, num_experts)

    def dispatch(self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Dispatched:
        """Return the tokens of all ranks that chose an expert of this rank, ordered by rank and then by token."""
        owner_NK = experts_NK // self.group_size
        chosen_NR = owner_NK.new_zeros(owner_NK.shape[0], self.ep, dtype=torch.bool).scatter_(1, owner_NK, True)
        chosen_NW = chosen_NR.repeat_interleave(self.etp, dim=1)
        sent, received = self._count(chosen_NW.sum(dim=0))
        rank_S, source_S = chosen_NW.T.nonzero().unbind(1)
        slots_NW = chosen_NW.T.flatten().cumsum(0).view(chosen_NW.T.shape).T - 1
        way_back = WayBack(ragged_rows(source_S, slots_NW, chosen_NW), sent, received)

        first_S1 = (rank_S // self.etp * self.group_size)[:, None]
        here_SK, experts_SK = _renumber(experts_NK[source_S], first_S1, self.group_size)
        weights_SK = torch.where(here_SK, gather_rows(weights_NK, way_back.rows), 0.0)
        # Start all three exchanges before waiting for the first. Choices travel as 32-bit numbers.
        arriving = [
            exchange(t, sent, received, self.group)
            for t in (experts_SK.int(), weights_SK, gather_rows(x_ND, way_back.rows))
        ]
        experts, weights, x = (functional.wait_tensor(t) for t in arriving)
        return Dispatched(x, experts.long(), weights, way_back)

    def combine(self, y_ND: Tensor, way_back: WayBack) -> Tensor:
        """Return the rows of each token and sum them, in the order of the ranks that computed them."""
        y_SD = functional.wait_tensor(exchange(y_ND, way_back.received, way_back.sent, self.group))
        return sum_rows(y_SD, way_back.rows)

    def _count(self, sent_W: Tensor) -> tuple[list[int], list[int]]:
        """Return the number of rows that this rank sends to each rank and receives from each.

        The host waits, because sizes of tensors depend on these numbers.
        """
        received_W = torch.empty_like(sent_W)
        dist.all_to_all_single(received_W, sent_W, group=self.group)
        sent, received = torch.stack((sent_W, received_W)).tolist()
        return sent, received


class AllGatherDispatcher:
    """Gives every rank of the group the tokens of all of them; all ranks must bring equally many."""

    def __init__(self, group: ProcessGroup, ep: int, etp: int, num_experts: int) -> None:
        self.group = group
        self.group_size = _experts_per_group(group, ep, etp, num_experts)
        self.first = dist.get_rank(group) // etp * self.group_size

    def dispatch(self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Dispatched:
        """Return the tokens of all ranks, ordered by rank."""
        arriving = [
            under_way(t, lambda t: start_all_gather(t, self.group), lambda t: start_reduce_scatter(t, self.group))
            for t in (experts_NK.int(), weights_NK, x_ND)
        ]
        experts, weights, x = (functional.wait_tensor(t) for t in arriving)
        here, experts = _renumber(experts.long(), self.first, self.group_size)
        return Dispatched(x, experts, torch.where(here, weights, 0.0), None)

    def combine(self, y_ND: Tensor, way_back: None) -> Tensor:
        """Return the sum of all ranks' results for this rank's own tokens."""
        return functional.wait_tensor(
            under_way(y_ND, lambda t: start_reduce_scatter(t, self.group), lambda t: start_all_gather(t, self.group))
        )


DISPATCHERS = {"all_to_all": AllToAllDispatcher, "all_gather": AllGatherDispatcher}


def apply_expert_parallel(
    moe_layers: Iterable[MoeLayer], expert_mesh: DeviceMesh, method: Literal["all_to_all", "all_gather"]
) -> None:
    """Split the experts of each layer, on the meta device, over the axes ep and etp of the expert view, in place.

    Their parameters become DTensors on this part of the mesh. If both axes are 1, nothing changes.
    """
    mesh = expert_mesh["ep", "etp"]
    ep, etp = mesh.shape
    if mesh.size() == 1:
        return
    group = flatten_mesh(mesh, "ep_etp").get_group()
    for layer in moe_layers:
        layer.dispatcher = DISPATCHERS[method](group, ep, etp, layer.num_experts)
        for name, placements in PLACEMENTS.items():
            whole = layer.experts.get_parameter(name)
            assert whole.is_meta, f"experts.{name} is on {whole.device}, but must be split on the meta device"
            part = distribute_tensor(whole.detach(), mesh, placements, src_data_rank=None)
            setattr(layer.experts, name, nn.Parameter(part))


class _UnderWay(torch.autograd.Function):
    """A functional collective whose gradient is another collective.

    It is written here so that Python sees the waits of backward too, and can time them.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.backward_of = backward
        return forward(values.contiguous())

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        return functional.wait_tensor(ctx.backward_of(grads[0].contiguous())), None, None


def under_way(values: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]) -> Tensor:
    """Start `forward` and return its result, for `functional.wait_tensor`; the gradient is the result of `backward`."""
    return _UnderWay.apply(values, forward, backward)  # pyright: ignore[reportReturnType]


def exchange(rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    """Start an all-to-all of rows, with these numbers per rank; wait for the result. Gradients travel back."""
    return under_way(
        rows,
        lambda t: start_all_to_all(t, received, sent, group),
        lambda t: start_all_to_all(t, sent, received, group),
    )


def _renumber(experts: Tensor, first: Tensor | int, group_size: int) -> tuple[Tensor, Tensor]:
    """Return which experts are in the group that starts with `first`, and all experts' numbers in that group."""
    inside = experts - first
    here = (inside >= 0) & (inside < group_size)
    return here, inside.masked_fill(~here, ELSEWHERE)


def _experts_per_group(group: ProcessGroup, ep: int, etp: int, num_experts: int) -> int:
    size = dist.get_world_size(group)
    assert size == ep * etp, f"a group of {size} ranks does not equal ep × etp = {ep} × {etp}"
    assert num_experts % ep == 0, f"{num_experts} experts cannot be split into {ep} equal groups"
    return num_experts // ep
