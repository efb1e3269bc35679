"""A whole small network with Triton's element-wise kernels, under the interpreter, has the losses, gradients and
statistics that it has with torch's operations; and which modules get which kernels."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from steptron.config.schema import LimitsConfig, RecomputeConfig
from steptron.model.heads import TokenLoss
from steptron.model.init import initialise
from steptron.model.inputs import Inputs, Rows
from steptron.model.transformer import Transformer, apply_stage
from steptron.moe.experts import make_backend
from steptron.parallel.ep import AllToAllDispatcher
from steptron.parallel.recompute import apply_recompute

from kernel_processes import child
from tiny import tiny_model, tiny_stage

T = 10
PARTS = ("attention", "ffn", "norm", "silu", "permutation")
CASES: dict[str, tuple[bool, float | None, tuple]] = {
    "plain": (False, None, ()),
    "exchanged, capacity, recomputed": (True, 2.0, PARTS),
}
"""Each case says whether tokens pass through an exchange, of one rank; the capacity; and what is recomputed."""
SAME = 2e-5
"""The largest relative error between two orders of fp32 sums in this network."""


class Recorder:
    """Keeps what it sees."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def observe(self, seen: Any) -> None:
        self.seen += [seen.routed_norm, seen.shared_norm, *seen.experts, *seen.shared, *seen.router[1:]]


@contextmanager
def group_of_one() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def network(exchanged: bool, capacity: float | None, parts: Any) -> Transformer:
    """Two layers with packed documents, limits, all balance losses, statistics and an MTP head."""
    model = Transformer(tiny_model(num_layers=2, num_mtp_heads=1))
    initialise(model, 3, 0.25)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # weights of norms start at 0, which hides them
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    for moe in model.moe_layers().values():
        moe.experts.backend, moe.observer, moe.capacity = make_backend("triton"), Recorder(), capacity
        if exchanged:
            moe.dispatcher = AllToAllDispatcher(dist.group.WORLD, 1, 1, moe.num_experts)  # pyright: ignore
    apply_recompute(model, RecomputeConfig(parts=parts))
    limits = LimitsConfig(routed={1: 0.3}, shared={1: 0.4})
    apply_stage(model.train(), tiny_stage(limits=limits), num_groups=2)
    return model


def results(model: Transformer) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(50, (1, T + 2), generator=generator)
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2]], dtype=torch.int32)
    inputs = Inputs.from_rows(Rows.unweighted(tokens, documents), T)
    losses = TokenLoss()(model, model(inputs=inputs), inputs)
    (losses.heads_H[0] + 0.3 * losses.heads_H[1] + 0.1 * losses.balance).backward()
    found = {"losses": losses.heads_H.detach(), "balance": losses.balance.detach()}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for n, moe in model.moe_layers().items():
        seen = moe.observer.seen  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        found |= {f"statistic {n}.{place}": value for place, value in enumerate(seen)}
    return found


def compare(case: str) -> dict[str, object]:
    """The relative errors that are too large, of how many, and how many kernels were launched."""
    from steptron.nn import triton_launch
    from steptron.parallel.elementwise import apply_elementwise

    kernels, launch = [], triton_launch.launch

    def counted(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
        kernels.append(kernel.fn.__name__)
        launch(kernel, programs, *args, **constants)

    triton_launch.launch = counted
    want = results(network(*CASES[case]))
    before = sorted(set(kernels))
    model = network(*CASES[case])
    apply_elementwise(model, "triton", compiled=False)
    got = results(model)
    triton_launch.launch = launch
    assert list(got) == list(want)
    errors = {n: float((got[n] - want[n]).norm() / want[n].norm().clamp(min=1e-6)) for n in want}
    wrong = {name: error for name, error in errors.items() if not error <= SAME}
    return {"wrong": wrong, "compared": len(errors), "before": before, "kernels": sorted(set(kernels))}


@pytest.fixture(scope="module")
def interpreted() -> dict:
    return child(__file__, "interpret", TRITON_INTERPRET="1")


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@pytest.mark.parametrize("case", CASES)
def test_the_network_is_the_same(case: str, interpreted: dict):
    found = interpreted[case]
    assert found["wrong"] == {}
    assert found["compared"] > 50
    assert found["before"] == ["_backward_kernel", "_forward_kernel"], "those of the experts' back end"
    names = {"_norm", "_turn", "_gate", "_take", "_add_up", "_count", "_place", "_router", "_shared", "_norms"}
    names |= {"_out_norms", "_by_expert", "_over_programs", "_norm_backward", "_turn_backward", "_gate_backward"}
    assert {f"{name}_kernel" for name in names} | set(found["before"]) == set(found["kernels"])


def test_what_is_compiled_keeps_torchs_operations():
    from steptron.moe import rows_triton
    from steptron.nn.elementwise import TORCH
    from steptron.nn.elementwise_triton import triton_gate, triton_norm, triton_turn
    from steptron.parallel.elementwise import apply_elementwise

    for compiled in (False, True):
        with torch.device("meta"):
            model = Transformer(tiny_model(num_mtp_heads=1))
        apply_elementwise(model, "triton", compiled)
        assert model.norm.norm is triton_norm
        block, moe = model.blocks()[1], model.moe_layers()[1]
        attention: Any = block.attention
        kernels = block.attention_norm.norm, attention.turn, attention.gate
        assert kernels == (TORCH if compiled else (triton_norm, triton_turn, triton_gate))
        assert moe.kernels is moe.experts.kernels
        assert moe.kernels.moves is rows_triton.BY_TRITON, "expert layers are not compiled"


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with group_of_one():
        print(json.dumps({case: compare(case) for case in CASES}))
