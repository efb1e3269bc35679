"""Expert parallel on 4 gloo ranks, started once, against one process that holds every expert and every token."""

from collections.abc import Iterator
from itertools import groupby
from math import ceil, comb
from typing import Any

import pytest
import torch
import torch.distributed as dist
from steptron.config.schema import MoeConfig
from steptron.moe.balance import group_loss
from steptron.moe.dispatch import LocalDispatcher
from steptron.moe.experts import make_backend
from steptron.moe.layer import MoeLayer
from steptron.moe.router import Routing
from steptron.nn.to_local import local
from steptron.parallel import ep as ep_module
from steptron.parallel.ep import apply_expert_parallel
from steptron.parallel.mesh import Layout, Meshes, build_meshes
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ranks import run_ranks

WORLD, D, I, E = 4, 16, 32, 8
MESHES = {"ep4": (4, 1, 1), "ep2-etp2": (2, 2, 1), "ep2-edp2": (2, 1, 2), "etp4": (1, 4, 1)}
"""(ep, etp, edp)."""
LOADS = {
    "uniform": (3, torch.zeros(E), [10] * WORLD),
    "skewed": (3, torch.linspace(1.0, 0.0, E), [10] * WORLD),
    "one-expert": (1, torch.eye(E)[5] * 9, [10] * WORLD),
    "one-rank": (2, torch.tensor([9.0] * 2 + [0.0] * (E - 2)), [10] * WORLD),
    "uneven": (3, torch.zeros(E), [7, 1, 17, 5]),
}
"""(experts a token, the router's bias, tokens of each rank)."""
METHODS = ["all_to_all", "all_gather"]
TOLERANCES = {"fp32": 1e-5, "fp64": 1e-12, "bf16": 2e-2}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}


def cases() -> Iterator[tuple[str, str, str, str]]:
    """(mesh, load, method, precision); gathering wants equally many tokens of each rank."""
    for mesh in MESHES:
        for load in LOADS:
            for method in METHODS:
                if (load, method) != ("uneven", "all_gather"):
                    yield from ((mesh, load, method, precision) for precision in ("fp32", "fp64"))
    yield from (("ep2-etp2", "skewed", method, "bf16") for method in METHODS)
    # Experts under FSDP2 too, which sums their gradients over edp; some ranks have no rows, and must reduce with the
    # others.
    yield from (("ep2-edp2 fsdp", load, method, "fp32") for load in ("skewed", "one-rank") for method in METHODS)


def config(top_k: int) -> MoeConfig:
    return MoeConfig(num_experts=E, top_k=top_k, ffn_size=I, shared_ffn_size=4, scaling_factor=3.0)


def build(load: str, precision: str) -> tuple[MoeLayer, Tensor, Tensor]:
    """The whole layer, the tokens of all ranks and the gradients of their results."""
    top_k, bias, sizes = LOADS[load]
    torch.manual_seed(0)
    layer = MoeLayer(D, config(top_k))
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    layer.experts.limit = 0.5
    x, grad = torch.randn(sum(sizes), D), torch.randn(sum(sizes), D)
    dtype = DTYPES[precision]
    layer.to(dtype)
    layer.router.bias = bias
    return layer, x.to(dtype), grad.to(dtype)


def build_split(layer: MoeLayer, meshes: Meshes, method: Any, fsdp: bool) -> MoeLayer:
    """The same layer, with this rank's part of the experts, cut out by hand."""
    with torch.device("meta"):
        split = MoeLayer(D, config(layer.router.config.top_k))
    split.to(layer.router.weight.dtype)
    apply_expert_parallel([split], meshes.expert, method)
    if fsdp:
        unit = fully_shard(split.experts, mesh=meshes.expert["edp_shard"])
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    split.to_empty(device="cpu")
    split.router.bias = layer.router.bias
    split.experts.limit = layer.experts.limit
    with torch.no_grad():
        for name, parameter in split.named_parameters():
            value = layer.get_parameter(name)
            if isinstance(parameter, DTensor):
                value = cut(name, value, meshes)
                if fsdp:
                    value = value.chunk(2)[meshes.expert.get_local_rank("edp_shard")]
                parameter.to_local().copy_(value)
            else:
                parameter.copy_(value)
    return split


def cut(name: str, whole: Tensor, meshes: Meshes) -> Tensor:
    """This rank's experts and columns of `experts.…`."""
    e, t = meshes.expert.get_local_rank("ep"), meshes.expert.get_local_rank("etp")
    experts, columns = E // meshes.layout.expert["ep"], I // meshes.layout.expert["etp"]
    part = whole[e * experts : (e + 1) * experts]
    mine = slice(t * columns, (t + 1) * columns)
    return part[:, :, mine] if name.endswith("w_down") else part[:, mine]


def error(got: Tensor, want: Tensor) -> float:
    """Return the error relative to the norm, or to 1 if the norm is smaller. With one expert per token its weight is
    constant, and the router's gradient is 0."""
    assert got.shape == want.shape, f"{tuple(got.shape)} for {tuple(want.shape)}"
    return float((got - want).double().norm() / want.double().norm().clamp(min=1.0))


def meshes_of(name: str) -> Meshes:
    ep, etp, edp = (MESHES | {"edp4": (1, 1, 4)})[name]
    dense = {"pp": 1, "dp_replicate": 1, "dp_shard": WORLD, "cp": 1, "tp": 1}
    expert = {"pp": 1, "edp_replicate": 1, "edp_shard": edp, "ep": ep, "etp": etp}
    return build_meshes(Layout(world_size=WORLD, dense=dense, expert=expert), "cpu")


def compare(rank: int, meshes: Meshes, load: str, method: str, precision: str, fsdp: bool) -> dict[str, float]:
    """Errors of everything the layer makes: the result, and all gradients; and whether the movement is what it should
    be."""
    layer, x, grad = build(load, precision)
    x.requires_grad_()
    y, _ = layer(x[None])
    y.backward(grad[None])
    split = build_split(layer, meshes, method, fsdp)
    sizes = LOADS[load][2]
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    x_mine = x[mine].detach().requires_grad_()
    y_mine, _ = split(x_mine[None])
    y_mine.backward(grad[None, mine])
    assert x.grad is not None
    assert x_mine.grad is not None
    errors = {"y": error(y_mine[0].detach(), y[0, mine].detach()), "x": error(x_mine.grad, x.grad[mine])}
    counts = split.take_counts()
    dist.all_reduce(counts)
    errors["counts"] = float((counts - layer.take_counts()).abs().sum()) + abs(
        int(counts.sum()) - len(x) * LOADS[load][0]
    )
    for name, parameter in split.named_parameters():
        want, got = layer.get_parameter(name).grad, parameter.grad
        assert want is not None
        assert got is not None, f"{name} has no gradient on rank {rank}"
        if isinstance(got, DTensor):
            want, got = cut(name, want, meshes), got.to_local()
            if fsdp:
                want = want.chunk(2)[meshes.expert.get_local_rank("edp_shard")]
            else:
                dist.all_reduce(got, group=meshes.expert["edp_shard"].get_group())
        else:
            dist.all_reduce(got)
        errors[name] = error(got, want)
    without_waiting = with_rows_from_counts(split, x_mine.detach(), y_mine.detach()) if precision == "fp32" else {}
    errors |= without_waiting | movement(rank, meshes, split, x_mine.detach(), method)
    if load != "uneven" and not fsdp:
        errors |= with_capacity(meshes, split, x_mine.detach(), grad[None, mine], method)
    return errors


def with_rows_from_counts(split: MoeLayer, x: Tensor, y: Tensor) -> dict[str, float]:
    """Return the error of a back end of GPUs, which has as many rows as the exchange of counts says."""
    before, split.experts.backend = split.experts.backend, make_backend("grouped")
    got, _ = split(x[None])
    split.experts.backend = before
    split.take_counts()
    return {"y by grouped products": error(got[0].detach(), y[0])}


def with_capacity(meshes: Meshes, split: MoeLayer, x: Tensor, grad: Tensor, method: str) -> dict[str, float]:
    """Return what differs from exact sizes where all fits, and how many choices too many or too few are left out
    elsewhere."""
    found, errors = [], {}
    backends = split.experts.backend, make_backend("grouped")
    for capacity, backend in ((None, backends[0]), (8.0, backends[0]), (8.0, backends[1])):
        if backend is backends[1] and x.dtype == torch.float64:  # grouped_mm has no kernel for it
            continue
        split.zero_grad()
        split.capacity, split.experts.backend = capacity, backend
        given = x.clone().requires_grad_()
        y, _ = split(given[None])
        y.backward(grad)
        assert given.grad is not None
        found.append([y.detach(), given.grad, *(p.grad.clone() for p in split.parameters() if p.grad is not None)])
    split.experts.backend = backends[0]
    for kind, others in zip(("fixed sizes", "fixed sizes, grouped"), found[1:], strict=False):
        errors[kind] = max(error(got, want) for got, want in zip(map(local, others), map(local, found[0]), strict=True))
    errors["left out of 8"] = float(split.take_overflow())
    for capacity in (1.0, 1.3):
        split.capacity = capacity
        split(x[None])
        overflow = split.take_overflow()
        dist.all_reduce(overflow)
        errors[f"left out of {capacity}"] = abs(int(overflow) - left_out(meshes, split.router(x), capacity, method))
    split.capacity = None
    split.take_counts()
    return errors


def left_out(meshes: Meshes, routing: Routing, capacity: float, method: str) -> int:
    """Count, choice by choice, what does not fit into buffers of this capacity on any rank."""
    ep, etp = (meshes.layout.expert[axis] for axis in ("ep", "etp"))
    chosen: list[Any] = [None] * WORLD
    dist.all_gather_object(chosen, routing.experts_NK.tolist())
    tokens, top_k = routing.experts_NK.shape
    reached = 1 - comb(E - E // ep, top_k) / comb(E, top_k)
    slots = min(ceil(capacity * tokens * reached), tokens) if method == "all_to_all" else tokens
    count = 0
    for first in range(0, WORLD, ep * etp):
        for owner in range(ep):
            arrived = 0
            for sender in range(first, first + ep * etp):
                here = [sum(e // (E // ep) == owner for e in choices) for choices in chosen[sender]]
                sent = [number for number in here if number]
                arrived += sum(sent[:slots])
                count += sum(sent[slots:]) * etp
            count += max(0, arrived - ceil(capacity * tokens * top_k * etp)) * etp
    return count


def movement(rank: int, meshes: Meshes, split: MoeLayer, x: Tensor, method: str) -> dict[str, float]:
    """Rows at this rank that are too many or missing, and choices that are not where they should be."""
    ep, etp = (meshes.layout.expert[axis] for axis in ("ep", "etp"))
    routing = split.router(x)
    here = split.dispatcher.dispatch(x, routing.experts_NK, routing.weights_NK)()
    choices: list[Any] = [None] * WORLD
    dist.all_gather_object(choices, routing.experts_NK)
    edp = rank // (ep * etp)
    group = torch.cat(choices[edp * ep * etp : (edp + 1) * ep * etp])
    wanted = (group // (E // ep) == meshes.expert.get_local_rank("ep")).any(dim=1)
    rows = int(wanted.sum()) if method == "all_to_all" else len(group)
    taken = (here.experts_NK >= 0).sum()
    miscounted = abs(here.num_here - int(taken))
    dist.all_reduce(taken)
    stray = (here.weights_NK[here.experts_NK < 0] != 0).sum()
    return {
        "rows": float(abs(here.x_ND.shape[0] - rows)),
        "number of choices": float(miscounted),
        "choices": abs(int(taken) / etp - sum(c.numel() for c in choices)) + float(stray),
        "repeatable": float(not torch.equal(split(x[None])[0], split(x[None])[0])),
    }


def order_of_work(meshes: Meshes) -> list[str]:
    """Return what a layer does forward and backward, in order: starts and waits of exchanges, products of the shared
    expert, and all routed experts. Repetitions are left out."""
    layer, x, _ = build("skewed", "fp32")
    split, done = build_split(layer, meshes, "all_to_all", fsdp=False), []

    def noted(name: str, function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            return function(*args, **kwargs)

        return run

    for name, module in (
        ("gate", split.shared.gate_proj),
        ("down", split.shared.down_proj),
        ("experts", split.experts),
    ):
        module.register_forward_hook(lambda module, args, out, name=name: done.append(name))
        module.register_full_backward_hook(lambda module, grads, outs, name=name: done.append(f"{name} backward"))
    start, wait = ep_module.start_all_to_all, ep_module.functional.wait_tensor
    ep_module.start_all_to_all = noted("start", start)
    ep_module.functional.wait_tensor = noted("wait", wait)
    y, _ = split(x[None, :10].requires_grad_())
    y.sum().backward()
    ep_module.start_all_to_all, ep_module.functional.wait_tensor = start, wait
    return [name for name, _ in groupby(done)]


def with_fault(rank: int, meshes: Meshes) -> dict[str, float]:
    """What the comparison says when rows come back a thousandth too large."""
    right = ep_module.exchange
    ep_module.exchange = lambda rows, *args: right(rows * 1.001 if rows.is_floating_point() else rows, *args)
    errors = compare(rank, meshes, "uniform", "all_to_all", "fp32", fsdp=False)
    ep_module.exchange = right
    return errors


def balance(rank: int, ranks: int, num_groups: int) -> dict[str, float]:
    """Shares of the EP-group loss of rows in pieces, and their gradients, against whole rows."""
    groups = [dist.new_group(list(range(first, first + ranks))) for first in range(0, WORLD, ranks)]
    group = groups[rank // ranks]
    assert isinstance(group, dist.ProcessGroup)
    generator = torch.Generator().manual_seed(3)
    rows, T, piece = 3, 8, 8 // ranks
    p_BTE = torch.rand(rows, T, E, generator=generator, dtype=torch.float64).requires_grad_()
    experts_BTK = torch.rand(rows, T, E, generator=generator).argsort(2)[..., :3]
    whole = group_loss(p_BTE.flatten(0, 1), experts_BTK.flatten(0, 1), rows, num_groups)
    mine = slice(rank % ranks * piece, (rank % ranks + 1) * piece)
    local_BTE = p_BTE.detach()[:, mine].clone().requires_grad_()
    share = group_loss(local_BTE.flatten(0, 1), experts_BTK[:, mine].flatten(0, 1), rows, num_groups, group)
    total = share.detach().clone()
    dist.all_reduce(total, group=group)
    errors = {"loss": error(total, whole.detach())}
    if num_groups > 1:
        (want,), (got,) = torch.autograd.grad(whole, p_BTE), torch.autograd.grad(share, local_BTE)
        errors["gradient"] = error(got, want[:, mine])
    return errors


def left_alone() -> bool:
    """Whether nothing is done where the expert view's ranks are all data parallel."""
    with torch.device("meta"):
        layer = MoeLayer(D, config(2))
    apply_expert_parallel([layer], meshes_of("edp4").expert, "all_to_all")
    plain = not any(isinstance(p, DTensor) for p in layer.parameters())
    return plain and isinstance(layer.dispatcher, LocalDispatcher)


def on_a_rank(rank: int) -> dict[Any, Any]:
    meshes = {name: meshes_of(name) for name in MESHES}
    results: dict[Any, Any] = {"alone": left_alone()}
    for case in cases():
        mesh, load, method, precision = case
        results[case] = compare(rank, meshes[mesh.split()[0]], load, method, precision, mesh.endswith("fsdp"))
    results["fault"] = with_fault(rank, meshes["ep4"])
    results["order"] = order_of_work(meshes["ep4"])
    for ranks in (2, 4):
        for num_groups in (1, 4):
            results["balance", ranks, num_groups] = balance(rank, ranks, num_groups)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """By rank: case → what was compared → how far off it is."""
    return run_ranks(WORLD, on_a_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", list(cases()), ids=" ".join)
def test_equals_one_process(results: list, case: tuple[str, str, str, str]):
    for rank, result in enumerate(results):
        for what, off in result[case].items():
            assert off <= TOLERANCES[case[3]], f"rank {rank}: {what} is off by {off:.1e}"


def test_a_fault_in_the_movement_is_seen(results: list):
    for what in ("y", "x", "router.weight", "experts.w_gate", "experts.w_up", "experts.w_down"):
        assert max(result["fault"][what] for result in results) > 1e-4, what


def test_the_shared_expert_computes_while_tokens_travel(results: list):
    forward = ["start", "gate", "wait", "experts", "start", "down", "wait"]
    backward = ["start", "down backward", "wait", "experts backward", "start", "gate backward", "wait"]
    assert results[0]["order"] == forward + backward


@pytest.mark.parametrize("num_groups", [1, 4], ids=lambda g: f"groups-{g}")
@pytest.mark.parametrize("ranks", [2, 4], ids=lambda r: f"ranks-{r}")
def test_ep_group_loss_of_rows_in_pieces(results: list, ranks: int, num_groups: int):
    for result in results:
        assert all(off < 1e-14 for off in result["balance", ranks, num_groups].values())


def test_without_axes_to_split_over_the_layer_is_left_as_it_is(results: list):
    assert all(result["alone"] for result in results)
