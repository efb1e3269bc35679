"""Expert parallel: routed experts over ranks (ep, etp); tokens travel by all-to-all, or all-gather and reduce-scatter.

The group of a dispatcher is (ep, etp) of the expert view, flattened: rank e · etp + t holds the e-th group of
consecutive experts, and of each expert the t-th FFN columns. Every rank brings its own tokens.

    x_ND ─ one row per rank with a chosen expert ─→ all-to-all ─→ experts ─→ all-to-all ─→ Σ of a token's rows ─→ y_ND
    x_ND ─ all-gather ─→ experts of each rank on all tokens ─→ reduce-scatter ─→ y_ND

A token is sent to a rank once, however many of its experts are there; with etp > 1, it is sent to all ranks that hold
columns of them. Ranks return partial sums over their experts or columns, which add up to the result.

The sizes of these tensors depend on the routing. Either the host reads them, which makes it wait once a layer, or they
are fixed to `capacity` times the size that even routing needs, and what does not fit is left out and counted.

Before a dispatcher waits for an exchange, it lets the other pass of a pipeline's pair run, if there is one
(`turns.py`).

Legend: N tokens, D hidden, K choices a token, R groups of experts (ep), W ranks of the group, S rows sent (a row: token
and rank).
"""

from collections.abc import Callable, Iterable
from math import ceil, comb
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from steptron.moe.dispatch import BY_TORCH, ELSEWHERE, Arriving, Dispatched, ExpertRows, gather_rows, sum_rows
from steptron.moe.layer import MoeLayer
from steptron.parallel.turns import Turns
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


class _Route(NamedTuple):
    """The rows that an exchange carries."""

    places_S: Tensor
    """The place of each row in [W, N], flattened. An empty row has −1, so that all its choices are elsewhere: it
    belongs to a group before the first."""
    way_back: WayBack
    num_here: int
    """The most choices that this rank receives."""
    left_out: Tensor | None = None
    """The number of choices that this rank does not send because they do not fit, int64 scalar; None: all fit."""


class AllToAllDispatcher:
    """Sends each token to the ranks that hold one of its chosen experts, and to no other rank."""

    def __init__(self, group: ProcessGroup, ep: int, etp: int, num_experts: int) -> None:
        self.group, self.ep, self.etp, self.num_experts = group, ep, etp, num_experts
        self.moves = BY_TORCH
        """The moves between tokens and rows; set from outside for the device."""
        self.group_size = _experts_per_group(group, ep, etp, num_experts)
        self.turns = Turns()

    def dispatch(
        self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor, capacity: float | None = None
    ) -> Arriving[Dispatched]:
        """Start to bring the tokens of all ranks that chose an expert of this rank, ordered by rank and then by token.

        With a capacity, which needs equally many tokens on all ranks, there are empty rows without choices among them.
        """
        num_tokens = len(experts_NK)
        owner_NK = experts_NK // self.group_size
        choices_RN = owner_NK.new_zeros(self.ep, num_tokens).scatter_add_(0, owner_NK.T, torch.ones_like(owner_NK.T))
        choices_WN = choices_RN if self.etp == 1 else choices_RN.repeat_interleave(self.etp, dim=0)
        route = self._exact(choices_WN) if capacity is None else self._fixed(choices_WN, experts_NK.shape[1], capacity)
        rows, sent, received = way_back = route.way_back

        first_S1 = (route.places_S // (num_tokens * self.etp) * self.group_size)[:, None]
        elsewhere_SK, experts_SK = _renumber(experts_NK[rows.source_P], first_S1, self.group_size)
        weights_SK = gather_rows(weights_NK, rows, self.moves).masked_fill(elsewhere_SK, 0.0)
        # Choices travel as 32-bit numbers.
        leaving = (experts_SK.int(), weights_SK, gather_rows(x_ND, rows, self.moves))
        arriving = [exchange(t, sent, received, self.group, self.turns) for t in leaving]

        def arrived() -> Dispatched:
            experts, weights, x = (wait() for wait in arriving)
            here = Dispatched(x, experts.long(), weights, route.num_here, way_back)
            return here if route.left_out is None else _leave_out(here, route.left_out)

        return arrived

    def combine(self, y_ND: Tensor, way_back: WayBack) -> Arriving[Tensor]:
        """Start to return the rows of each token. They are summed in the order of the ranks that computed them."""
        arriving = exchange(y_ND, way_back.received, way_back.sent, self.group, self.turns)
        return lambda: sum_rows(arriving(), way_back.rows, self.moves)

    def _exact(self, choices_WN: Tensor) -> _Route:
        """Return the route of all tokens to all ranks with one of their choices."""
        sent_WN = choices_WN > 0
        sent, received, num_here = self._count(torch.stack([sent_WN.sum(1), choices_WN.sum(1)], dim=1))
        places_S, rows = _rows_to_send(sent_WN, sum(sent))
        return _Route(places_S, WayBack(rows, sent, received), num_here)

    def _fixed(self, choices_WN: Tensor, top_k: int, capacity: float) -> _Route:
        """Return the route by buffers that hold `capacity` times the rows of even routing for each rank.

        The expected number of tokens with one of K choices among the experts of a rank is N · (1 − C(E − E/R, K) ÷
        C(E, K)). One more row of each buffer stays empty.
        """
        ranks, tokens = choices_WN.shape
        missed = comb(self.num_experts - self.group_size, top_k) / comb(self.num_experts, top_k)
        slots = min(ceil(capacity * tokens * (1 - missed)), tokens) + 1
        number_WN = (choices_WN > 0).cumsum(1)
        not_sent_WN = (choices_WN == 0) | (number_WN >= slots)
        size, nobody = ranks * slots, ranks * slots - 1
        before_W = torch.arange(-1, nobody, slots, device=choices_WN.device)
        slots_WN = (number_WN + before_W[:, None]).masked_fill_(not_sent_WN, nobody)
        places_S = slots_WN.new_full((size,), -1)
        places_S.scatter_(0, slots_WN.flatten(), torch.arange(slots_WN.numel(), device=slots_WN.device))
        places_S[nobody] = -1
        rows = ExpertRows(places_S % tokens, slots_WN.T.contiguous(), nobody=nobody)
        limit = min(ceil(capacity * tokens * top_k * self.etp), size * top_k)
        sizes = [slots] * ranks
        return _Route(places_S, WayBack(rows, sizes, sizes), limit, left_out=(choices_WN * not_sent_WN).sum())

    def _count(self, sent_W2: Tensor) -> tuple[list[int], list[int], int]:
        """Return the number of rows that this rank sends to each rank and receives from each, and the number of choices
        that it receives.

        `sent_W2`: rows and choices for each rank. The host waits, because sizes of tensors depend on these numbers. It
        is the only wait of a layer.
        """
        received_W2 = torch.empty_like(sent_W2)
        counting = dist.all_to_all_single(received_W2, sent_W2, group=self.group, async_op=True)
        assert counting is not None, "this rank is in the group"
        self.turns.started()
        self.turns.give()
        counting.wait()
        sent, received = torch.stack((sent_W2, received_W2)).tolist()
        return [rows for rows, _ in sent], [rows for rows, _ in received], sum(choices for _, choices in received)


class AllGatherDispatcher:
    """Gives every rank of the group the tokens of all of them; all ranks must bring equally many."""

    def __init__(self, group: ProcessGroup, ep: int, etp: int, num_experts: int) -> None:
        self.group, self.etp = group, etp
        self.group_size = _experts_per_group(group, ep, etp, num_experts)
        self.first = dist.get_rank(group) // etp * self.group_size
        self.turns = Turns()

    def dispatch(
        self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor, capacity: float | None = None
    ) -> Arriving[Dispatched]:
        """Start to bring the tokens of all ranks, ordered by rank."""
        arriving = [self._gather(t) for t in (experts_NK.int(), weights_NK, x_ND)]
        share = experts_NK.numel() * self.etp

        def arrived() -> Dispatched:
            experts, weights, x = (wait() for wait in arriving)
            elsewhere, experts = _renumber(experts.long(), self.first, self.group_size)
            here = Dispatched(x, experts, weights.masked_fill(elsewhere, 0.0), 0, None)
            if capacity is not None:
                return _leave_out(here._replace(num_here=min(ceil(capacity * share), experts.numel())), 0)
            # The host waits, because the number of rows depends on it.
            return here._replace(num_here=elsewhere.numel() - int(elsewhere.sum()))

        return arrived

    def combine(self, y_ND: Tensor, way_back: None) -> Arriving[Tensor]:
        """Start to sum all ranks' results for this rank's own tokens."""
        return under_way(
            y_ND, lambda t: start_reduce_scatter(t, self.group), lambda t: start_all_gather(t, self.group), self.turns
        )

    def _gather(self, t_N: Tensor) -> Arriving[Tensor]:
        return under_way(
            t_N, lambda t: start_all_gather(t, self.group), lambda t: start_reduce_scatter(t, self.group), self.turns
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


def take_turns(moe_layers: Iterable[MoeLayer], turns: Turns) -> None:
    """Let the layers' dispatchers give the turn to the other pass of a pair before they wait for an exchange.

    A dispatcher that exchanges nothing never gives it.
    """
    for layer in moe_layers:
        if isinstance(layer.dispatcher, AllToAllDispatcher | AllGatherDispatcher):
            layer.dispatcher.turns = turns


class _Travel:
    """A collective and the one that takes the gradient back."""

    def __init__(self, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor], turns: Turns) -> None:
        self._forward, self._backward, self._turns = forward, backward, turns
        self.gradient: Tensor | None = None
        """The gradient on its way back. Autograd would refuse its shape as a gradient of what has arrived."""

    def start(self, values: Tensor) -> Tensor:
        """Start the collective."""
        self._turns.started()
        return self._forward(values.contiguous())

    def start_back(self, gradient: Tensor) -> None:
        """Start the collective of the gradient."""
        self._turns.started()
        self.gradient = self._backward(gradient.contiguous())

    def wait(self, started: Tensor) -> Tensor:
        """Wait for a collective that has started, and let the other pass of a pair run before."""
        self._turns.give()
        return functional.wait_tensor(started)

    def wait_back(self) -> Tensor:
        """Wait for the gradient."""
        assert self.gradient is not None, "a gradient that is waited for has started"
        gradient, self.gradient = self.gradient, None
        return self.wait(gradient)


class _Start(torch.autograd.Function):
    """Starts a collective. Its backward waits for the gradient's, which `_End` has started."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, travel: _Travel) -> Tensor:
        ctx.travel = travel
        return travel.start(values)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        return ctx.travel.wait_back(), None


class _End(torch.autograd.Function):
    """Waits for a collective. Its backward starts the gradient's."""

    @staticmethod
    def forward(ctx: Any, started: Tensor, travel: _Travel) -> Tensor:
        ctx.travel = travel
        return travel.wait(started)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        ctx.travel.start_back(grads[0])
        return grads[0], None  # nobody reads it


def under_way(
    values: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor], turns: Turns
) -> Arriving[Tensor]:
    """Start the collective `forward`; its gradient is the collective `backward`.

    What runs between the start and the wait runs beside the collective, and so does its backward pass. Nothing else may
    use the tensor that is on its way, for it has no values yet.
    """
    travel = _Travel(forward, backward, turns)
    started = _Start.apply(values, travel)
    return lambda: _End.apply(started, travel)  # pyright: ignore[reportReturnType]


def exchange(rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup, turns: Turns) -> Arriving[Tensor]:
    """Start an all-to-all of rows, with these numbers per rank. Gradients travel back."""
    return under_way(
        rows,
        lambda t: start_all_to_all(t, received, sent, group),
        lambda t: start_all_to_all(t, sent, received, group),
        turns,
    )


def _rows_to_send(sent_WN: Tensor, num_rows: int) -> tuple[Tensor, ExpertRows]:
    """Return the places [S] of the `num_rows` true values of `sent_WN`, flattened, and their rows in both directions.

    The host does not wait, since it knows the number of rows. They are numbered from 1, and what is false is written to
    row 0, which is cut.
    """
    flat_M, tokens = sent_WN.flatten(), sent_WN.shape[1]
    numbers_M = flat_M.cumsum(0).mul_(flat_M)
    places = numbers_M.new_empty(num_rows + 1).scatter_(0, numbers_M, torch.arange(len(flat_M), device=flat_M.device))
    by_token_M = numbers_M.view_as(sent_WN).T.flatten()
    sent_M = by_token_M > 0
    numbers = by_token_M.new_empty(num_rows + 1).scatter_(0, sent_M.cumsum(0).mul_(sent_M), by_token_M)
    sizes_N, places_S = sent_WN.sum(0), places[1:]
    return places_S, ExpertRows(places_S % tokens, numbers[1:] - 1, sizes_N.cumsum(0) - sizes_N)


def _renumber(experts: Tensor, first: Tensor | int, group_size: int) -> tuple[Tensor, Tensor]:
    """Return which experts are not in the group that starts with `first`, and all experts' numbers in that group."""
    inside = experts - first
    elsewhere = inside // group_size != 0
    return elsewhere, inside.masked_fill_(elsewhere, ELSEWHERE)


def _leave_out(here: Dispatched, left_out: Tensor | int) -> Dispatched:
    """Send the choices beyond the first `num_here` elsewhere, and count them with those that were left out before."""
    assert here.num_here is not None, "choices are left out by number"
    inside_NK = here.experts_NK >= 0
    beyond_NK = inside_NK & (inside_NK.flatten().cumsum(0).view_as(inside_NK) > here.num_here)
    return here._replace(
        experts_NK=here.experts_NK.masked_fill(beyond_NK, ELSEWHERE),
        weights_NK=here.weights_NK.masked_fill(beyond_NK, 0.0),
        overflow=beyond_NK.sum() + left_out,
    )


def _experts_per_group(group: ProcessGroup, ep: int, etp: int, num_experts: int) -> int:
    size = dist.get_world_size(group)
    assert size == ep * etp, f"a group of {size} ranks does not equal ep × etp = {ep} × {etp}"
    assert num_experts % ep == 0, f"{num_experts} experts cannot be split into {ep} equal groups"
    return num_experts // ep
