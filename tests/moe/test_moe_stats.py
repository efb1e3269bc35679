"""What an observer sees, against the same numbers from the tokens one by one, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from choices import dispatched
from steptron.config.schema import MoeConfig
from steptron.moe.dispatch import ELSEWHERE
from steptron.moe.experts import Experts, make_backend
from steptron.moe.layer import MoeLayer
from steptron.moe.stats import ExpertStats, Observation
from torch import Tensor
from torch.utils.checkpoint import checkpoint

B, T, D, I, E, K = 3, 10, 16, 24, 8, 2
N = B * T
LIMITED = pytest.mark.parametrize("limit", [None, 0.3], ids=["free", "limited"])
BACKENDS = pytest.mark.parametrize("backend", ["blocks", "batched", "grouped"])


class Recorder:
    def __init__(self) -> None:
        self.seen: list[Observation] = []

    def observe(self, seen: Observation) -> None:
        self.seen.append(seen)


def make(limit: float | None = None) -> tuple[MoeLayer, Tensor, Recorder]:
    torch.manual_seed(0)
    layer = MoeLayer(D, MoeConfig(num_experts=E, top_k=K, ffn_size=I, shared_ffn_size=20, scaling_factor=3.0))
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    layer.router.bias.normal_(std=0.1)
    layer.experts.limit = layer.shared.limit = limit
    layer.observer = recorder = Recorder()
    return layer, torch.randn(B, T, D), recorder


@torch.no_grad()
def expert_by_hand(experts: Experts, x_ND: Tensor, experts_NK: Tensor, e: int) -> dict[str, float]:
    """The statistics of one expert, of the tokens that chose it."""
    x = x_ND[(experts_NK == e).any(1)].double()
    gate, up = x @ experts.w_gate[e].double().mT, x @ experts.w_up[e].double().mT
    act, lin, L = F.silu(gate), up, experts.limit
    clipped = 0
    if L is not None:
        clipped = int((act > L).sum() + (up.abs() > L).sum())
        act, lin = act.clamp(max=L), up.clamp(-L, L)
    out = (act * lin) @ experts.w_down[e].double().mT
    return {
        "rows": len(x),
        "h_square": float((act * lin).square().sum()),
        "gate_up": float((gate[:, : I // 8] * up[:, : I // 8]).sum()),
        "gate_square": float(gate[:, : I // 8].square().sum()),
        "up_square": float(up[:, : I // 8].square().sum()),
        "out_norm": float(out.norm(dim=1).sum()),
        "clipped": clipped,
        "peak_gate": max(0.0, float(F.silu(gate).max())) if len(x) else 0.0,
        "peak_up": float(up.abs().max()) if len(x) else 0.0,
    }


@torch.no_grad()
def assert_by_hand(stats: ExpertStats, experts: Experts, x_ND: Tensor, experts_NK: Tensor, rtol: float = 1e-5) -> None:
    for e in range(E):
        want = expert_by_hand(experts, x_ND, experts_NK, e)
        got = {name: float(value[e]) for name, value in stats._asdict().items()}
        assert got == pytest.approx(want, rel=rtol, abs=rtol), f"expert {e}"


@LIMITED
@BACKENDS
def test_experts(limit: float | None, backend: str):
    layer, x, recorder = make(limit)
    layer.experts.backend = make_backend(backend)
    layer(x)
    (seen,) = recorder.seen
    x_ND, experts_NK = x.flatten(0, 1), seen.routing.experts_NK
    assert seen.counts_E.tolist() == seen.experts.rows.tolist()
    assert seen.counts_E.sum() == N * K
    assert_by_hand(seen.experts, layer.experts, x_ND, experts_NK)
    assert (seen.experts.clipped.sum() > 0) == (limit is not None)


@BACKENDS
def test_only_rows_that_are_here_count(backend: str):
    """Choices elsewhere, experts without a token, and rows of several blocks."""
    layer, x, _ = make(0.3)
    layer.experts.backend = make_backend(backend)
    experts_NK = torch.randint(E, (N, K))
    experts_NK[experts_NK == 3] = ELSEWHERE
    experts_NK[:, 1] = torch.where(experts_NK[:, 1] == experts_NK[:, 0], ELSEWHERE, experts_NK[:, 1])
    weights_NK = torch.rand(N, K) + 0.1
    _, stats = layer.experts(dispatched(x.flatten(0, 1), experts_NK, weights_NK), True)
    assert stats.rows[3] == 0
    assert_by_hand(stats, layer.experts, x.flatten(0, 1), experts_NK)


@BACKENDS
def test_bf16_is_near(backend: str):
    layer, x, _ = make(0.3)
    layer.experts.bfloat16()
    layer.experts.backend = make_backend(backend)
    x_ND, experts_NK = x.flatten(0, 1).bfloat16(), torch.rand(N, E).argsort(1)[:, :K]
    _, stats = layer.experts(dispatched(x_ND, experts_NK, torch.rand(N, K) + 0.1), True)
    for e in range(E):
        want = expert_by_hand(layer.experts, x_ND, experts_NK, e)
        for name in ("rows", "h_square", "gate_square", "up_square", "out_norm", "peak_gate", "peak_up"):
            assert float(getattr(stats, name)[e]) == pytest.approx(want[name], rel=3e-2), f"expert {e}, {name}"


@torch.no_grad()
def test_router():
    layer, x, recorder = make()
    layer(x)
    (seen,) = recorder.seen
    logits = x.flatten(0, 1).double() @ layer.router.weight.double().mT
    p = torch.sigmoid(logits)
    share, scores = p / p.sum(1, keepdim=True), p + layer.router.bias
    ordered = scores.sort(dim=1, descending=True).values
    assert seen.router.tokens == N
    torch.testing.assert_close(seen.router.mass_E.double(), share.sum(0), rtol=1e-5, atol=0)
    want = {
        "confidence": share.gather(1, seen.routing.experts_NK).sum(),
        "entropy": -(share * share.log()).sum(),
        "margin": (ordered[:, K - 1] - ordered[:, K]).sum(),
        "logit_max": logits.abs().max(),
    }
    for name, value in want.items():
        assert float(getattr(seen.router, name)) == pytest.approx(float(value), rel=1e-5), name
    assert want["entropy"] < N * math.log(E)


@LIMITED
@torch.no_grad()
def test_shared_and_the_ratio(limit: float | None):
    layer, x, recorder = make(limit)
    layer(x)
    (seen,) = recorder.seen
    x_ND = x.flatten(0, 1)
    gate, up = layer.shared.gate_proj(x_ND).double(), layer.shared.up_proj(x_ND).double()
    clipped = 0 if limit is None else int((F.silu(gate) > limit).sum() + (up.abs() > limit).sum())
    assert int(seen.shared.clipped) == clipped
    assert (clipped > 0) == (limit is not None)
    assert float(seen.shared.peak_gate) == pytest.approx(float(F.silu(gate).max()), rel=1e-6)
    assert float(seen.shared.peak_up) == pytest.approx(float(up.abs().max()), rel=1e-6)
    shared = layer.shared(x_ND)
    routed = layer.compute(x_ND, seen.routing.experts_NK, seen.routing.weights_NK).routed_ND
    assert float(seen.shared_norm) == pytest.approx(float(shared.norm(dim=1).sum()), rel=1e-5)
    assert float(seen.routed_norm) == pytest.approx(float(routed.norm(dim=1).sum()), rel=1e-5)


@BACKENDS
def test_being_seen_changes_nothing(backend: str):
    layer, x, recorder = make(0.3)
    layer.experts.backend = make_backend(backend)
    results = []
    for observer in (recorder, None):
        layer.observer = observer
        y, _ = layer(x.requires_grad_())
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert len(recorder.seen) == 1


@pytest.mark.parametrize("part", ["layer", "all experts"])
def test_a_pass_that_backward_repeats_is_shown_once(part: str):
    layer, x, recorder = make(0.3)
    if part == "layer":
        y, _ = checkpoint(layer, x.requires_grad_(), use_reentrant=False)
    else:
        compute = layer.compute
        layer.compute = lambda *args: checkpoint(compute, *args, use_reentrant=False)
        y, _ = layer(x.requires_grad_())
    asked = []
    compute = layer.experts.backend.compute

    def note(*args):
        asked.append(args[-1].with_stats)
        return compute(*args)

    layer.experts.backend = layer.experts.backend._replace(compute=note)
    y.sum().backward()
    assert len(recorder.seen) == 1
    assert asked == [False], "nobody looks at the statistics of a repeated pass"


def test_nothing_seen_carries_a_gradient():
    layer, x, recorder = make()
    layer(x.requires_grad_())
    (seen,) = recorder.seen
    parts = (seen.routing, seen.router, seen.experts, seen.shared, (seen.counts_E, seen.routed_norm, seen.shared_norm))
    assert not any(t.requires_grad for part in parts for t in part if isinstance(t, Tensor))
